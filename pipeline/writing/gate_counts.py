"""What becomes of a unit's rows at each gate, for its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.gating.gate import passes
from pipeline.settings.gates import GatesConfig
from pipeline.writing.manifest import GateCounts
from pipeline.writing.rows import REASONS, OutputRow

QUARTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def gate_counts(rows: Sequence[OutputRow], config: GatesConfig | None) -> dict[str, GateCounts]:
    """By gate, of all rows together, kept or not; nothing for a run without gates."""
    return {} if config is None else {name: _at_gate(rows, config, name) for name in sorted(config.gates)}


def _at_gate(rows: Sequence[OutputRow], config: GatesConfig, name: str) -> GateCounts:
    numbers = [row[name] for row in rows if row.get(name) is not None]
    rejected = [row for row in rows if name in row[REASONS]]
    # A result that was stopped before its edit met no other gate, though its picture has figures.
    passed = sum(name not in row[REASONS] and not _stopped(row) and bool(passes(config, row, name)) for row in rows)
    return GateCounts(
        passed=passed,
        rejected=len(rejected),
        alone=sum(len(row[REASONS]) == 1 for row in rejected),
        undefined=len(rows) - passed - len(rejected),
        measured=len(numbers),
        seen=tuple(float(np.quantile(numbers, share)) for share in QUARTILES) if numbers else (),
    )


def _stopped(row: OutputRow) -> bool:
    return row[REASONS] == ["inversion_psnr"]


def added(one: Mapping[str, GateCounts], other: Mapping[str, GateCounts]) -> dict[str, GateCounts]:
    """What became of two units' rows, by gate."""
    return {**one, **{name: _both(one[name], gate) if name in one else gate for name, gate in other.items()}}


def _both(one: GateCounts, other: GateCounts) -> GateCounts:
    """Of both together. Their quartiles are taken for the means of each one's, weighted by how many numbers it has."""
    seen = one.seen or other.seen
    if one.seen and other.seen:
        share = other.measured / (one.measured + other.measured)
        inner = [a + (b - a) * share for a, b in zip(one.seen[1:-1], other.seen[1:-1], strict=True)]
        seen = (min(one.seen[0], other.seen[0]), *inner, max(one.seen[-1], other.seen[-1]))
    numbers = ("passed", "rejected", "alone", "undefined", "measured")
    return GateCounts(seen=seen, **{name: getattr(one, name) + getattr(other, name) for name in numbers})


def seen_in_words(gate: GateCounts) -> str:
    """The figures that a gate saw: "0.2 to 9.1, half of them 1.1 to 4.3"."""
    if not gate.seen:
        return "no figure"
    least, lower, _, upper, greatest = (f"{value:.3g}" for value in gate.seen)
    return f"{least} to {greatest}, half of them about {lower} to {upper}"
