"""The report's first part: the run in numbers, what failed and why, methods and edits compared."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.common.wording import count, size_text
from pipeline.evaluation.metrics import NAMES
from pipeline.evaluation.verdict import HAPPENED, LOST, Verdict
from pipeline.looking.report.selection import Gains, Verdicts, key_of, spread
from pipeline.looking.results import ResultRef, RunFolder
from pipeline.remote.pictures import spent_in_words

MAX_LINES = 24  # of a table
MAX_DOTS = 600  # of the drawing
ALL_LEVELS = 255.0

Scored = tuple[ResultRef, Verdict, float | None]
"""A result, what is said of it, and its text gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """How far the run is: counts from the manifests, pace and completeness from the summary, where there is one."""

    done: int
    failed: int
    images: int
    images_per_second: float | None
    complete: bool
    rejected: int = 0  # by gates, all of a result's attempts

    @classmethod
    def of(cls, run: RunFolder) -> RunCounts:
        """Of a run's folder."""
        summary = run.summary or {}
        return cls(
            done=run.totals.done,
            failed=run.totals.failed,
            rejected=run.totals.rejected,
            images=run.totals.images,
            images_per_second=summary.get("images_per_second"),
            complete=bool(summary.get("complete")),
        )

    @property
    def asked(self) -> int:
        """Results that were asked for and are committed."""
        return self.done + self.rejected + self.failed

    def sentence(self) -> str:
        """The run in one line."""
        parts = [f"{count(self.done, 'result')} from {count(self.images, 'image')}."]
        if self.failed or self.rejected:
            parts[0] = f"{self.done:,} of {count(self.asked, 'result')} from {count(self.images, 'image')}."
        if self.rejected:
            parts.append(f"{self.rejected:,} did not pass the gates.")
        if self.failed:
            parts.append(f"{self.failed:,} failed and {'is' if self.failed == 1 else 'are'} kept in quarantine.")
        if not self.complete:
            parts.append("The run is not complete: the same command goes on from here.")
        elif not self.failed and not self.rejected:
            parts.append("Everything that was asked for is here.")
        return " ".join(parts)


def tiles(counts: RunCounts, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The big numbers at the top: the two questions first."""
    found = [tile("images", f"{counts.images:,}"), tile("results", f"{counts.done:,}")]
    edits = [verdict.edit for _, verdict, _ in scored if verdict.edit]
    rests = [verdict.rest for _, verdict, _ in scored if verdict.rest]
    if edits:
        found.append(tile("edit happened", share_text(sum(edit == "done" for edit in edits), len(edits))))
    if rests:
        found.append(tile("rest stayed", share_text(sum(rest == "kept" for rest in rests), len(rests))))
    if counts.rejected:
        found.append(tile("rejected by gates", f"{counts.rejected:,}"))
    found.append(tile("failed", f"{counts.failed:,}", bad=counts.failed > 0))
    if counts.images_per_second:
        found.append(tile("images per second", f"{counts.images_per_second:.3g}"))
    return found


def bar(counts: RunCounts, scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """All that was asked for as parts of one bar: how the edits went, and what failed."""
    edits: Counter[str] = Counter(verdict.edit or "not judged" for _, verdict, _ in scored)
    grades = {"done": "good", "faint": "fair", "off target": "fair", "nothing changed": "poor", "not judged": "none"}
    parts = [
        # Of a long run not all results were read: their shares stand for all.
        (f"edit {name}" if name in ("done", "faint") else name, grade, counts.done * edits[name] / len(scored))
        for name, grade in grades.items()
        if edits[name]
    ]
    parts += [("rejected by gates", "none", float(counts.rejected))] if counts.rejected else []
    parts += [("failed", "failed", float(counts.failed))] if counts.failed else []
    return [
        {"label": label, "grade": grade, "weight": round(weight, 2), "share": share_text(weight, counts.asked)}
        for label, grade, weight in parts
    ]


def tile(label: str, value: str, *, bad: bool = False) -> dict[str, Any]:
    """One big number."""
    return {"label": label, "value": value, "bad": bad}


def share_text(part: float, whole: float) -> str:
    """A share in percent; 100 and 0 mean all and none."""
    percent = 100 * part / whole
    rounded = min(max(round(percent), 1 if part else 0), 100 if part == whole else 99)
    return f"{rounded} %"


def method_lines(scored: Sequence[Scored], failures: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """One line per method and edit, the best mean score first: means over what is defined, shares of what is judged."""
    groups: dict[tuple[str, str], list[Scored]] = {}
    for one in scored:
        groups.setdefault((one[0].method, one[0].edit), []).append(one)
    failed: dict[tuple[str, str], int] = {}
    for failure in failures:
        pair = (failure["method"], failure["edit"])
        failed[pair] = failed.get(pair, 0) + 1
        groups.setdefault(pair, [])
    lines = [method_line(pair, members, failed.get(pair, 0)) for pair, members in groups.items()]
    # A line without any score comes last.
    return sorted(
        lines, key=lambda line: (line["score"] is None, -(line["score"] or 0.0), line["method"], line["edit"])
    )


def method_line(pair: tuple[str, str], members: Sequence[Scored], failed: int) -> dict[str, Any]:
    """One line of the table."""
    line: dict[str, Any] = {"method": pair[0], "edit": pair[1], "count": len(members), "failed": failed}
    for name in NAMES:
        line[name] = mean_of([ref.figures.get(name) for ref, _, _ in members])
    line["mask_percent"] = None if line["mask_share"] is None else 100 * line["mask_share"]
    line["score"] = mean_of([verdict.score for _, verdict, _ in members])
    line["gain"] = mean_of([gain for _, _, gain in members])
    edits = [verdict.edit for _, verdict, _ in members if verdict.edit]
    line["happened"] = share_text(sum(edit == "done" for edit in edits), len(edits)) if edits else None
    rests = [verdict.rest for _, verdict, _ in members if verdict.rest]
    line["stayed"] = share_text(sum(rest == "kept" for rest in rests), len(rests)) if rests else None
    return line


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of those that are defined."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined else None


def drawing(scored: Sequence[Scored]) -> dict[str, Any] | None:
    """Every result as a dot: to the right the edit's change, upwards the rest that stayed. None for fewer than eight.

    Both axes show the square root of levels, so that the small differences that decide have room.
    """
    known = [
        (ref, verdict, change, drift)
        for ref, verdict, _ in scored
        if (change := ref.figures.get("edit_change")) is not None
        and (drift := ref.figures.get("rest_change")) is not None
    ]
    if len(known) < 8:
        return None
    dots = [
        {
            "left": round(percent_of(change, ALL_LEVELS), 1),
            "top": round(percent_of(drift, LOST), 1),
            "grade": worse(verdict),
            "title": f"{ref.id}, {ref.edit}, {ref.method}: edit {change:.0f}, rest {drift:.1f}",
        }
        for ref, verdict, change, drift in spread(known, MAX_DOTS)
    ]
    ticks = [
        {"left": round(percent_of(levels, ALL_LEVELS), 1), "text": f"{levels:.0f}"} for levels in (HAPPENED, 100, 160)
    ]
    return {"dots": dots, "nothing": round(percent_of(HAPPENED, ALL_LEVELS), 1), "ticks": ticks}


def percent_of(levels: float, most: float) -> float:
    """Place on an axis, 0..100."""
    return 100 * (min(levels, most) / most) ** 0.5


def worse(verdict: Verdict) -> str:
    """The worse of both colours."""
    grades = (verdict.edit_grade, verdict.rest_grade)
    return next(grade for grade in ("poor", "fair", "good", "") if grade in grades)


def failure_table(failures: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """What failed, by stage and reason, the most frequent first; reasons that differ in numbers alone are one."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in failures:
        reason = re.sub(r"\d+", "#", row["message"].replace(row["id"], "#"))
        group = groups.setdefault(
            (row["stage"], row["error_class"], reason),
            {"stage": row["stage"], "error_class": row["error_class"], "message": row["message"]}
            | {"examples": [], "count": 0},
        )
        group["count"] += 1
        if len(group["examples"]) < 3 and row["id"] not in group["examples"]:
            group["examples"].append(row["id"])
    return sorted(groups.values(), key=lambda group: (-group["count"], group["stage"], group["message"]))


def failures_note(counts: RunCounts, read: int, reasons: int) -> str:
    """How complete the table is, and where the rest stands."""
    note = f"{count(counts.failed, 'result')} failed. Their bytes and reasons are kept in quarantine/."
    if read < counts.failed:
        note += f" Reasons are counted over {read:,} of them."
    if reasons > MAX_LINES:
        note += f" The {MAX_LINES} most frequent of {reasons} reasons."
    return note


def lines_note(read: int, done: int, lines: int) -> str:
    """How many results the table of methods covers."""
    note = "Means over all results." if read == done else f"Means over {read:,} of {count(done, 'result')}."
    return note + (f" The first {MAX_LINES} of {lines} lines." if lines > MAX_LINES else "")


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
        ("Rows of a network call", str(run.record.get("call_size", ""))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run.record.get("versions", {}).items())),
        ("Network rows", f"{run.totals.network_rows:,}"),
        ("Servers", spent_in_words(run.totals.spent) if run.totals.spent else ""),
        ("Output", size_text(run.totals.output_bytes)),
    ]
    return [(label, value) for label, value in found if value]


def settings(section: dict[str, Any]) -> str:
    """A method and its settings in one line."""
    rest = [f"{key.replace('_', ' ')} {value}" for key, value in section.items() if key != "method"]
    return f"{section.get('method', '')}: {', '.join(rest)}" if rest else str(section.get("method", ""))


def scored_of(refs: Sequence[ResultRef], verdicts: Verdicts, gains: Gains) -> list[Scored]:
    """Results with what is said of them."""
    return [(ref, verdicts[key_of(ref)], gains.get(key_of(ref))) for ref in refs]
