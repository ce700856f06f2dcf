"""What goes into an export, and into which split: duplicates, what gates rejected, pairs of better and worse.

The rows of all runs are read once for this. Kept are a place and a digest per row, some hundred bytes.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import RecipeError
from pipeline.pairs.preferences import Candidate, Preferred, Score, pairs_among
from pipeline.pairs.presets import Preset
from pipeline.pairs.results import ACCEPTED, REJECTED, Place, Results, Row, is_accepted, name_of
from pipeline.writing.manifest import kind_of

SHOWN = 5  # rows that an error names
IN_CAPTIONS = "target_prompt"


@dataclass(frozen=True, slots=True)
class Item:
    """A row of the export."""

    place: Place
    size: int  # bytes of its pictures
    worse: Place | None = None  # of a pair of preference
    score: float | None = None
    worse_score: float | None = None


@dataclass(slots=True)
class Left:
    """What is not exported, and why."""

    duplicates: int = 0  # input, result and instruction alike
    rejected: int = 0  # by gates, or not the one chosen
    no_pair: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True, kw_only=True)
class Plan:
    """What goes where."""

    splits: dict[str, list[Item]]
    left: Left
    sources: int  # different input images
    figures: Mapping[str, array[float]]  # of the results that are exported
    edits: Mapping[str, int]  # results by edit
    reasons: Mapping[str, int]  # results that each gate rejected
    captions: str  # which text is a caption


class _Filled:
    """Whether every row has what a preset's columns need."""

    def __init__(self, preset: Preset) -> None:
        self._preset = preset
        self._without: dict[str, list[str]] = {}
        self.has_captions = True

    def see(self, row: Row) -> None:
        missing = [text for text in self._preset.texts if not (row[text] or "").strip()]
        if self._preset.needs_mask and row["mask"] is None:
            missing.append("mask")
        for name in missing:
            self._without.setdefault(name, []).append(name_of(row))
        self.has_captions &= bool((row[IN_CAPTIONS] or "").strip())

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, rows in self._without.items():
            shown = ", ".join(rows[:SHOWN]) + (" ..." if len(rows) > SHOWN else "")
            way = "Take a preset without masks" if name == "mask" else "Give edits an instruction or prompts"
            yield name, f"is {'missing' if name == 'mask' else 'empty'} in {len(rows):,} row(s): {shown}. {way}"


def planned(
    results: Results,
    preset: Preset,
    name: str,
    *,
    validation: float,
    with_rejected: bool,
    score: Score | None,
    margin: float,
) -> Plan:
    """Look at every row.

    Args:
        results: of the runs.
        preset: whose columns are to be filled.
        name: of the preset.
        validation: share of the source images that is held out.
        with_rejected: what gates rejected is exported, too.
        score: decides pairs of preference; None: gates do.
        margin: between better and worse, at least.

    Raises:
        RecipeError: columns cannot be filled, there is no row, or no split can be made.
        SinkError: a run cannot be read.
    """
    seen: set[bytes] = set()
    left, filled = Left(), _Filled(preset)
    reasons: Counter[str] = Counter()
    groups: dict[bytes, list[Candidate]] = defaultdict(list)
    figures: dict[str, array[float]] = defaultdict(lambda: array("d"))
    edits: Counter[str] = Counter()
    takes_all = preset.pairs or with_rejected
    for place in results.places((ACCEPTED, REJECTED)):
        row = results.read(place)
        accepted = is_accepted(place, row)
        if kind_of(place.path) == REJECTED:
            reasons.update(row["reject_reasons"] or ())
        if not accepted and not takes_all:
            left.rejected += 1
            continue
        source, pair = _digests(row)
        if pair in seen:
            left.duplicates += 1
            continue
        seen.add(pair)
        filled.see(row)
        results.mark(place, row)  # a result that cannot be marked is told before anything is written
        size = len(row["input"]["bytes"]) + len(row["image"]["bytes"])
        number = row["figures"].get(score.name) if score else None
        number = None if number is None or not math.isfinite(number) else number
        group = hashlib.sha256(source + _asked(row)).digest() if preset.pairs else pair
        groups[group].append(Candidate(place, size, source, accepted, number))
        edits[row["edit"]] += 1
        for figure, value in row["figures"].items():
            if value is not None and math.isfinite(value):
                figures[figure].append(value)
    items = list(_items(groups, preset, score, margin, left.no_pair))
    problems = list(filled.problems()) or list(_no_rows(items, left, preset))
    if problems:
        raise RecipeError(f"preset {name}", problems)
    held_out = _held_out({source for source, _ in items}, validation, name)
    splits: dict[str, list[Item]] = {split: [] for split in preset.splits}
    for source, item in items:
        splits[preset.splits[source in held_out]].append(item)
    captions = IN_CAPTIONS if filled.has_captions else "instruction"
    sources = len({source for source, _ in items})
    return Plan(
        splits=splits, left=left, sources=sources, figures=figures, edits=edits, reasons=reasons, captions=captions
    )


def _digests(row: Row) -> tuple[bytes, bytes]:
    """Of the input, and of input, result and instruction together."""
    source = hashlib.sha256(row["input"]["bytes"]).digest()
    edited = hashlib.sha256(row["image"]["bytes"]).digest()
    return source, hashlib.sha256(source + edited + _said(row)).digest()


def _said(row: Row) -> bytes:
    return (row["instruction"] or "").encode()


def _asked(row: Row) -> bytes:
    """What results of one edit have in common: their instruction, before a judge rewrote it by what it saw of each."""
    return (row["instruction_given"] or row["instruction"] or "").encode()


def _items(
    groups: Mapping[bytes, Sequence[Candidate]],
    preset: Preset,
    score: Score | None,
    margin: float,
    why_not: Counter[str],
) -> Iterator[tuple[bytes, Item]]:
    """What is exported, with the digest of its source."""
    for candidates in groups.values():
        if not preset.pairs:
            (one,) = candidates
            yield one.source, Item(one.place, one.size)
        elif (found := pairs_among(candidates, score, margin, why_not)) is not None:
            yield found.better.source, _item(found)


def _item(pair: Preferred) -> Item:
    better, worse = pair.better, pair.worse
    return Item(better.place, better.size + worse.size, worse.place, better.score, worse.score)


def _no_rows(items: Sequence[object], left: Left, preset: Preset) -> Iterator[tuple[str, str]]:
    if items:
        return
    if preset.pairs:
        why = ", ".join(f"{count:,} times {reason}" for reason, count in left.no_pair.most_common())
        yield (
            "pairs",
            f"there is none: {why or 'the runs have no result'}. Give runs that hold several attempts, or two runs "
            "of the same sources, and name a --score",
        )
    elif left.rejected:
        yield "runs", f"gates rejected all of their {left.rejected:,} results. Give --with-rejected to export these"
    else:
        yield "runs", "have no result"


def _held_out(sources: set[bytes], share: float, name: str) -> set[bytes]:
    """The source images of the second split: those with the smallest digests, so that a set that grows keeps nearly all
    of them where they were. All edits of an image are on its side.

    Raises:
        RecipeError: one of the splits would be empty.
    """
    if not share:
        return set()
    count = max(1, round(share * len(sources)))
    if count >= len(sources):
        raise RecipeError(
            f"preset {name}",
            [
                (
                    "validation",
                    f"{share:g} of {len(sources)} source image(s) leaves no row to train on. Lower it; 0 is one split",
                )
            ],
        )
    return set(sorted(sources)[:count])
