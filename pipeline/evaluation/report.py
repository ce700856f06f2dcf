"""report.html: a run at a glance, in one file that opens from disk and on a phone.

It shows the run's numbers, what failed and why, figures by method and edit, and a few dozen results as input, mask and
edit, the worst first. Cost: reads figures of at most `MAX_FILES` files and pictures of at most `MAX_CARDS` results,
however long the run was; the page stays below 3 MB.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jinja2

import pipeline
from pipeline.evaluation.metrics import MAX_PSNR, NAMES
from pipeline.evaluation.results import Result, ResultRef, RunFolder
from pipeline.evaluation.thumbnails import data_uri, load_mask, load_rgb, mask_over, thumbnail
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import put

MAX_CARDS = 60  # results with pictures: three thumbnails of about 6 kB each
MAX_FILES = 256  # data files, and quarantine files, that are read; spread evenly over longer runs
MAX_GROUPS = 24  # lines of a table
BINS = 40  # of the histogram


def write_report(sink: SinkConfig | str) -> str:
    """Write `report.html` into a run's folder, from what its manifests say is committed.

    Args:
        sink: the recipe's sink section, or its folder alone.

    Returns:
        Where the report stands, as a URL or path.

    Raises:
        SinkError: no run is there, or the report cannot be written.
    """
    run = RunFolder(sink)
    put(run.fs, f"{run.root}/report.html", render_report(run).encode())
    return f"{run.sink.folder.rstrip('/')}/report.html"


def render_report(run: RunFolder) -> str:
    """The page's text."""
    files = run.files("data")
    refs = run.figures(spread(files, MAX_FILES))
    chosen = choose(refs, MAX_CARDS)
    counts = RunCounts.of(run)
    groups = grouped(refs)
    failures = FailureTable.of(run)
    return _template().render(
        title=run.name,
        version=pipeline.__version__,
        max_psnr=int(MAX_PSNR),
        lead=counts.sentence(),
        done=counts.done,
        failed=counts.failed,
        tiles=tiles(counts, refs),
        failures=failures.rows,
        failures_note=failures.note(counts),
        groups=[group_row(pair, members) for pair, members in list(groups.items())[:MAX_GROUPS]],
        groups_note=groups_note(len(refs), counts.done, len(groups)),
        histogram=histogram([value for ref in refs if (value := ref.figures["background_psnr"]) is not None]),
        results_note=results_note(len(chosen), counts.done),
        cards=[card(result) for result in run.load(chosen)],
        methods=sorted({ref.method for ref in chosen}),
        edits=sorted({ref.edit for ref in chosen}),
        facts=facts(run),
    )


@cache
def _template() -> jinja2.Template:
    # Captions, prompts, keys and messages come from outside: autoescape is what keeps them text.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evaluation", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.j2")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """How far the run is: counts from the manifests, pace and completeness from the summary, where there is one."""

    done: int
    failed: int
    images: int
    images_per_second: float | None
    complete: bool

    @classmethod
    def of(cls, run: RunFolder) -> RunCounts:
        """Of a run's folder."""
        summary = run.summary or {}
        return cls(
            done=run.totals.done,
            failed=run.totals.failed,
            images=run.totals.images,
            images_per_second=summary.get("images_per_second"),
            complete=bool(summary.get("complete")),
        )

    def sentence(self) -> str:
        """The run in one line."""
        asked = self.done + self.failed
        parts = [f"{count(self.done, 'result')} from {count(self.images, 'image')}."]
        if self.failed:
            parts[0] = f"{self.done:,} of {count(asked, 'result')} from {count(self.images, 'image')}."
            parts.append(f"{self.failed:,} failed and {'is' if self.failed == 1 else 'are'} kept in quarantine.")
        if not self.complete:
            parts.append("The run is not complete: the same command goes on from here.")
        elif not self.failed:
            parts.append("Everything that was asked for is here.")
        return " ".join(parts)


def tiles(counts: RunCounts, refs: Sequence[ResultRef]) -> list[dict[str, Any]]:
    """The big numbers at the top."""
    found = [
        tile("results", f"{counts.done:,}"),
        tile("failed", f"{counts.failed:,}", bad=counts.failed > 0),
        tile("images", f"{counts.images:,}"),
    ]
    if counts.images_per_second:
        found.append(tile("images per second", f"{counts.images_per_second:.3g}"))
    for label, name, form, unit in (
        ("background, median", "background_psnr", "{:.1f}", "dB"),
        ("mask, median", "mask_share", "{:.1%}", ""),
    ):
        values = [value for ref in refs if (value := ref.figures[name]) is not None]
        if values:
            found.append(tile(label, form.format(statistics.median(values)), unit))
    return found


def tile(label: str, value: str, unit: str = "", *, bad: bool = False) -> dict[str, Any]:
    """One big number."""
    return {"label": label, "value": value, "unit": unit, "bad": bad}


def spread(items: Sequence[str], limit: int) -> list[str]:
    """At most `limit` items, evenly over all of them."""
    if len(items) <= limit:
        return list(items)
    return [items[at * len(items) // limit] for at in range(limit)]


def worst_first(ref: ResultRef) -> tuple[float, str, str, str]:
    """Sort key: background PSNR; results without one come last."""
    value = ref.figures["background_psnr"]
    return (float("inf") if value is None else value, ref.id, ref.edit, ref.method)


def grouped(refs: Iterable[ResultRef]) -> dict[tuple[str, str], list[ResultRef]]:
    """Results by (method, edit), in that order."""
    groups: dict[tuple[str, str], list[ResultRef]] = {}
    for ref in refs:
        groups.setdefault((ref.method, ref.edit), []).append(ref)
    return dict(sorted(groups.items()))


def choose(refs: Sequence[ResultRef], limit: int) -> list[ResultRef]:
    """Whom to show: of every method and edit its worst, and as many spread over the rest, so that both are seen."""
    if len(refs) <= limit:
        return sorted(refs, key=worst_first)
    groups = [sorted(members, key=worst_first) for members in grouped(refs).values()]
    queues = []
    for members in groups:
        worst = members[: limit // 2]
        rest = members[len(worst) :]
        others = [rest[at * len(rest) // limit] for at in range(min(limit, len(rest)))] if rest else []
        # Taken from the front by turns: worst, typical, worst, ... however few places a group gets.
        queues.append([ref for pair in _alternate(worst, _by_halves(others)) for ref in pair])
    chosen: dict[tuple[str, int], ResultRef] = {}
    place = 0
    while len(chosen) < limit and any(place < len(queue) for queue in queues):
        for queue in queues:
            if place < len(queue) and len(chosen) < limit:
                ref = queue[place]
                chosen[ref.file, ref.row] = ref
        place += 1
    return sorted(chosen.values(), key=worst_first)


def _alternate(ones: Sequence[ResultRef], others: Sequence[ResultRef]) -> list[tuple[ResultRef, ...]]:
    longest = max(len(ones), len(others))
    return [(*ones[at : at + 1], *others[at : at + 1]) for at in range(longest)]


def _by_halves(items: list[ResultRef]) -> list[ResultRef]:
    """The middle, then the middles of both halves, and so on: any beginning of this is spread over the whole."""
    ordered, ranges = [], [(0, len(items))]
    while ranges:
        start, stop = ranges.pop(0)
        if start < stop:
            middle = (start + stop) // 2
            ordered.append(items[middle])
            ranges += [(start, middle), (middle + 1, stop)]
    return ordered


def group_row(pair: tuple[str, str], members: Sequence[ResultRef]) -> dict[str, Any]:
    """One line of the table of figures: means over what is defined; the mask in percent."""
    row: dict[str, Any] = {"method": pair[0], "edit": pair[1], "count": len(members)}
    for name in NAMES:
        values = [value for ref in members if (value := ref.figures[name]) is not None]
        row[name] = statistics.fmean(values) if values else None
    if row["mask_share"] is not None:
        row["mask_share"] *= 100
    return row


def groups_note(read: int, done: int, groups: int) -> str:
    """What the table rests on."""
    note = "Means over all results." if read == done else f"Means over {read:,} of {count(done, 'result')}."
    return note + (f" The first {MAX_GROUPS} of {groups} lines." if groups > MAX_GROUPS else "")


def results_note(shown: int, done: int) -> str:
    """Which results are shown, and how to look at them."""
    note = "Hold an edit to see its input."
    if shown < done:
        note = f"{shown} of {done:,}: those whose background changed most, and others spread over the rest. " + note
    return note


def histogram(values: Sequence[float]) -> dict[str, Any] | None:
    """Bars of a small drawing, 100 high; None where there is nothing to distribute."""
    if len(values) < 8 or min(values) == max(values):
        return None
    low, high = int(min(values)), int(max(values)) + 1
    counts = Counter(min(int((value - low) / (high - low) * BINS), BINS - 1) for value in values)
    top, step = max(counts.values()), (high - low) / BINS
    bars = [
        {
            "x": place * 10 + 1,
            "y": round(100 - 96 * number / top, 1),
            "width": 8,
            "height": round(96 * number / top, 1),
            "title": f"{low + place * step:.1f} to {low + (place + 1) * step:.1f} dB: {number}",
        }
        for place, number in sorted(counts.items())
    ]
    return {"bars": bars, "low": low, "high": high, "width": BINS * 10}


def card(result: Result) -> dict[str, Any]:
    """What the page shows of one result."""
    figures = result.ref.figures
    original = thumbnail(load_rgb(result.input))
    mask = None if result.mask is None else load_mask(result.mask)
    share = figures["mask_share"]
    return {
        "id": result.ref.id,
        "edit": result.ref.edit,
        "method": result.ref.method,
        "caption": result.caption[:400],
        "concepts": [concept_chip(concept) for concept in result.request.get("concepts", [])],
        "target_prompt": result.request.get("target_prompt", ""),
        "figures": figures,
        "mask_percent": None if share is None else 100 * share,
        "grade": grade(figures),
        "has_mask": mask is not None,
        "input": data_uri(original),
        "overlay": data_uri(mask_over(original, mask)),
        "edited": data_uri(thumbnail(load_rgb(result.image))),
    }


def concept_chip(concept: dict[str, Any]) -> dict[str, Any]:
    """A concept's prompt, and whether it is taken away."""
    removes = (concept.get("guidance_scale", 0) < 0) != (concept.get("direction") == "remove")
    return {"prompt": concept.get("prompt", ""), "minus": removes}


def grade(figures: dict[str, float | None]) -> str:
    """How well the background was kept, as a colour: against what the autoencoder alone allows, where that is known."""
    value, best = figures["background_psnr"], figures["reconstruction_psnr"]
    if value is None:
        return ""
    good, fair = (30.0, 24.0) if best is None else (min(best, 40.0) - 3.0, min(best, 40.0) - 8.0)
    return "good" if value >= good else "fair" if value >= fair else "poor"


@dataclass(slots=True)
class FailureTable:
    """What failed, by stage and reason; reasons that differ in numbers alone are one."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    files_read: int = 0
    files: int = 0
    reasons: int = 0

    @classmethod
    def of(cls, run: RunFolder) -> FailureTable:
        """Read the quarantine."""
        files = run.files("quarantine")
        chosen = spread(files, MAX_FILES)
        groups: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in run.failures(chosen):
            reason = re.sub(r"\d+", "#", row["message"].replace(row["id"], "#"))
            group = groups.setdefault(
                (row["stage"], row["error_class"], reason),
                {
                    "stage": row["stage"],
                    "error_class": row["error_class"],
                    "message": row["message"],
                    "examples": [],
                    "count": 0,
                },
            )
            group["count"] += 1
            if len(group["examples"]) < 3 and row["id"] not in group["examples"]:
                group["examples"].append(row["id"])
        rows = sorted(groups.values(), key=lambda group: (-group["count"], group["stage"], group["message"]))
        return cls(rows[:MAX_GROUPS], len(chosen), len(files), len(rows))

    def note(self, counts: RunCounts) -> str:
        """How complete the table is, and where the rest stands."""
        note = f"{count(counts.failed, 'result')} failed. Their bytes and reasons are kept in quarantine/."
        if self.files_read < self.files:
            note += f" Reasons are counted in {self.files_read} of {self.files} files."
        if self.reasons > len(self.rows):
            note += f" The {len(self.rows)} most frequent of {self.reasons} reasons."
        return note


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """What made the run, from run.json."""
    recipe = run.record.get("recipe", {})
    model = run.record.get("model", {})
    methods = recipe.get("methods") or {"": {name: recipe.get(name, {}) for name in ("inversion", "editing")}}
    found = [
        ("Model", " ".join(str(model[name]) for name in ("name", "revision") if model.get(name))),
        ("Weights", ", ".join(str(model[name]) for name in ("digest", "dtype", "device") if model.get(name))),
    ]
    for name, method in methods.items():
        for part in ("inversion", "editing"):
            label = f"{part.capitalize()} of {name}" if name else part.capitalize()
            found.append((label, settings(method.get(part, {}))))
    found += [
        ("Source", ", ".join(recipe.get("source", {}).get("shards", []))),
        ("Seed", str(recipe.get("run", {}).get("seed", ""))),
        ("Recipe", str(run.record.get("recipe_hash", ""))),
        ("Rows of a UNet call", str(run.record.get("call_size", ""))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.record.get("versions", {}).items())),
        ("UNet rows", f"{run.totals.unet_rows:,}"),
        ("Output", size_text(run.totals.output_bytes)),
    ]
    return [(label, value) for label, value in found if value]


def settings(section: dict[str, Any]) -> str:
    """A method and its settings in one line."""
    rest = [f"{key.replace('_', ' ')} {value}" for key, value in section.items() if key != "method"]
    return f"{section.get('method', '')}: {', '.join(rest)}" if rest else str(section.get("method", ""))


def count(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(size: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
