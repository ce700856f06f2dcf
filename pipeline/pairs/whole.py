"""What only a whole set tells: doubled rows and ids, exchanged sides, rows that slipped by one, leaks between splits.

Memory: about a kilobyte per pair while its shard is looked at, some hundred bytes after that.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.pairs.records import SEVERITIES, Finding, Seen

RUN = 4  # rows in a row whose neighbour fits better
BETTER = 0.1  # by so much of a correlation
FITS = 0.5  # correlation of a neighbour that fits
NEAR = 3  # bits of 64 that near duplicates may differ in
BIAS, ENOUGH = 0.3, 30  # pixels that the middle pair is displaced by, of so many pairs at least


@dataclass(frozen=True, slots=True)
class _Kept:
    """What stays of a pair."""

    id: str
    shard: str
    index: int
    part: str
    split: str
    turn: int | None
    prompt: str
    source: bytes
    edited: bytes
    hash: int | None


class Whole:
    """Takes pairs shard by shard, each shard's in the order of its rows."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._of_shards: list[Finding] = []
        self._aligned: list[tuple[float, float, float, float]] = []
        self._masks: Counter[str] = Counter()

    def add(self, pairs: Sequence[Seen]) -> None:
        """A shard."""
        self._of_shards += slipped([pair for pair in pairs if not pair.part])
        for pair in pairs:
            self._kept.append(
                _Kept(
                    pair.id,
                    pair.shard,
                    pair.index,
                    pair.part,
                    pair.split,
                    pair.turn,
                    pair.prompt,
                    pair.source,
                    pair.edited,
                    pair.hash,
                )
            )
            numbers = [pair.figures.get(f"align_{name}") for name in ("dx", "dy", "sx", "sy")]
            if all(isinstance(one, float) for one in numbers):
                dx, dy, sx, sy = (float(one or 0.0) for one in numbers)
                self._aligned.append((dx, dy, sx, sy))
            if "change_missed" in pair.figures:
                self._masks["all"] += 1
                self._masks["missed"] += any(kind == "mask_misses_change" for kind, _ in pair.findings)

    def findings(self) -> Iterator[Finding]:
        """What the whole tells."""
        yield from self._of_shards
        yield from self._doubled()
        yield from self._exchanged()
        yield from self._leaks()
        yield from self._near()
        if self._masks["missed"] > self._masks["all"] / 2:
            yield whole("mask_inverted", f"of {self._masks['all']} masks {self._masks['missed']} lie beside the change")
        middle = self.alignment()
        if middle is not None and middle["n"] >= ENOUGH and max(abs(middle["dx"]), abs(middle["dy"])) > BIAS:
            yield whole(
                "alignment_biased", f"the middle pair is displaced by {middle['dx']:+.2f}, {middle['dy']:+.2f} px"
            )

    def alignment(self) -> dict[str, float] | None:
        """Middle shift and scale of all pairs that could be aligned; None for none. One beside 0 and 1 is a bug of
        resizing."""
        if not self._aligned:
            return None
        middle = np.median(np.array(self._aligned), axis=0)
        return {"n": len(self._aligned), **dict(zip(("dx", "dy", "sx", "sy"), map(float, middle), strict=True))}

    def _doubled(self) -> Iterator[Finding]:
        rows = [one for one in self._kept if not one.part]
        yield from _groups(rows, "duplicate_id", lambda one: (one.split, one.id, one.turn))
        pairs = [one for one in self._kept if one.source and one.edited]
        yield from _groups(pairs, "duplicate_pair", lambda one: (one.source, one.edited, one.prompt))
        several = defaultdict(set)
        for one in pairs:
            several[one.source, one.prompt, one.part].add(one.edited)
        for one in pairs:
            if len(several[one.source, one.prompt, one.part]) > 1:
                yield finding(one, "variant", "another result of the same source and instruction is there")

    def _exchanged(self) -> Iterator[Finding]:
        """Results that are other rows' source, of rows whose own source is none of any other.

        A chain of edits, each going on from the last result, is legal: it is told by its turns, or by a result that one
        other row alone goes on from.
        """
        rows = [one for one in self._kept if not one.part and one.source and one.edited and one.source != one.edited]
        sources = Counter(one.source for one in rows)
        results = Counter(one.edited for one in rows)
        for one in rows:
            if sources[one.edited] == 0 or sources[one.source] > 1 or one.turn is not None or results[one.edited] > 1:
                continue
            kind = "swapped" if sources[one.edited] > 1 else "swapped_suspect"
            yield finding(one, kind, f"the result is the source of {sources[one.edited]} other row(s)")

    def _leaks(self) -> Iterator[Finding]:
        splits = defaultdict(set)
        for one in self._kept:
            if one.source and one.split:
                splits[one.source].add(one.split)
        for one in self._kept:
            if not one.part and len(splits.get(one.source, ())) > 1:
                yield finding(one, "split_leak", f"its source is in {', '.join(sorted(splits[one.source]))}")

    def _near(self) -> Iterator[Finding]:
        """Sources that look alike: hashes that differ in at most `NEAR` bits agree in one of four quarters."""
        first: dict[int, _Kept] = {}
        for one in self._kept:
            if one.hash is not None and not one.part:
                first.setdefault(one.hash, one)
        buckets = defaultdict(list)
        for value in first:
            for quarter in range(4):
                buckets[quarter, (value >> (16 * quarter)) & 0xFFFF].append(value)
        reported = set()
        for values in buckets.values():
            for at, value in enumerate(values):
                for other in values[:at]:
                    if value not in reported and (value ^ other).bit_count() <= NEAR:
                        reported.add(value)
                        yield finding(first[value], "near_duplicate", f"looks like {first[other].id}")


def _groups(rows: Iterable[_Kept], kind: str, key) -> Iterator[Finding]:  # type: ignore[no-untyped-def]
    groups = defaultdict(list)
    for one in rows:
        groups[key(one)].append(one)
    for group in groups.values():
        if len(group) > 1:
            for one in group:
                others = [f"{other.shard}#{other.index}" for other in group if other is not one]
                yield finding(one, kind, f"also {', '.join(others[:3])}" + (" ..." if len(others) > 3 else ""))


def slipped(pairs: Sequence[Seen]) -> Iterator[Finding]:
    """Runs of rows whose result belongs to the neighbour's source: a failed row was dropped from one side alone."""
    for step in (1, -1):
        start: int | None = None
        wins = 0
        for at in range(len(pairs) + 1):
            won = _neighbour_wins(pairs, at, step) if at < len(pairs) else False
            if won:
                start, wins = (at, 1) if start is None else (start, wins + 1)
            elif won is False:
                if start is not None and wins >= RUN:
                    first = pairs[start]
                    sign = "+" if step > 0 else "-"
                    yield Finding(
                        id=first.id,
                        shard=first.shard,
                        index=first.index,
                        finding="off_by_one",
                        detail=f"from row {first.index} on edited of row i belongs to source i {sign} 1; {wins} rows",
                        severity="error",
                    )
                start, wins = None, 0


def _neighbour_wins(pairs: Sequence[Seen], at: int, step: int) -> bool | None:
    """Whether a neighbour's source fits a row's result better than its own; None where that cannot be told."""
    if not 0 <= at + step < len(pairs):
        return None
    own, other = pairs[at], pairs[at + step]
    if not (own.source_thumb and own.edited_thumb and other.source_thumb):
        return None
    here, there = (alike(source, own.edited_thumb) for source in (own.source_thumb, other.source_thumb))
    return there > FITS and there > here + BETTER


def alike(one: bytes, other: bytes) -> float:
    """Correlation of two thumbnails; 0 where either is plain."""
    first, second = (np.frombuffer(each, dtype=np.uint8).astype(np.float64) for each in (one, other))
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float((first @ first) * (second @ second)))
    return float(first @ second) / norm if norm > 1e-9 else 0.0


def finding(one: _Kept | Seen, kind: str, detail: str) -> Finding:
    """A finding of a row."""
    severity = SEVERITIES[kind]
    return Finding(id=one.id, shard=one.shard, index=one.index, finding=kind, detail=detail, severity=severity)


def whole(kind: str, detail: str) -> Finding:
    """A finding of the set."""
    return Finding(id="", shard="", index=-1, finding=kind, detail=detail, severity=SEVERITIES[kind])
