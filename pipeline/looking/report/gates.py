"""The report's part about gates: how many results each let pass, what it saw, and what it rejected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.common.wording import count
from pipeline.looking.results import ResultRef, RunFolder
from pipeline.settings.gates import Bounds

BINS = 24
SHOWN_REASONS = 24  # combinations of gates


def gate_lines(run: RunFolder, refs: Sequence[ResultRef]) -> list[dict[str, Any]]:
    """One line per gate, the one that rejected most first: counts of the whole run, and a histogram of what was read.

    Args:
        run: opened.
        refs: results that were read, kept and rejected.
    """
    lines = [
        {
            "name": name,
            "bounds": str(Bounds.model_validate(run.gates[name])) if name in run.gates else "",
            "passed": gate.passed,
            "rejected": gate.rejected,
            "alone": gate.alone,
            "undefined": gate.undefined,
            "percent": None if not gate.passed + gate.rejected else 100 * gate.passed / (gate.passed + gate.rejected),
            "seen": gate.seen,
            "bars": bars(name, refs),
        }
        for name, gate in run.totals.gates.items()
    ]
    return sorted(lines, key=lambda line: (-line["rejected"], line["name"]))


def bars(name: str, refs: Sequence[ResultRef]) -> dict[str, Any] | None:
    """A histogram of a gate's figure in `BINS` parts: heights in percent, of results that passed it and others."""
    values = [(value, name in ref.reasons) for ref in refs if (value := ref.figures.get(name)) is not None]
    if not values:
        return None
    least, greatest = min(value for value, _ in values), max(value for value, _ in values)
    width = (greatest - least) / BINS or 1.0
    counts = [[0, 0] for _ in range(BINS)]
    for value, is_rejected in values:
        counts[min(int((value - least) / width), BINS - 1)][is_rejected] += 1
    most = max(map(sum, counts))
    return {
        "least": least,
        "greatest": greatest,
        "bins": [
            {
                "passed": round(100 * passed / most, 1),
                "rejected": round(100 * rejected / most, 1),
                "title": f"{least + at * width:.3g} to {least + (at + 1) * width:.3g}: {passed + rejected}",
            }
            for at, (passed, rejected) in enumerate(counts)
        ],
    }


def reasons(refs: Sequence[ResultRef]) -> list[dict[str, Any]]:
    """Rejected results by the gates that rejected them, the most frequent combination first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for ref in refs:
        if ref.is_rejected:
            groups.setdefault(ref.reasons, []).append(ref.id)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:SHOWN_REASONS]
    return [
        {
            "gates": ", ".join(gates) or "no gate: another attempt was chosen",
            "count": len(ids),
            "examples": list(dict.fromkeys(ids))[:3],
        }
        for gates, ids in ordered
    ]


def note(run: RunFolder, refs: Sequence[ResultRef]) -> str:
    """How many results passed, and how complete the histograms are."""
    totals = run.totals
    asked = totals.done + totals.rejected + totals.failed
    rows = totals.done + totals.rejected_rows
    said = f"{totals.done:,} of {count(asked, 'result')} passed every gate. What was rejected is kept in rejected/."
    return said if len(refs) >= rows else f"{said} Histograms and reasons are of {len(refs):,} rows out of {rows:,}."
