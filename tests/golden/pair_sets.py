"""Replays of drawn pairs: how they lie on one another, and what an audit finds of planted defects.

A folder is replayed as a whole: `cases.json` with its pictures, or a set of pairs with its `expected.json`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.pairs.alignment import Alignment, align
from pipeline.pairs.audit import AuditConfig, audit
from tests.golden.checks import Check

FAR = 5.0  # pixels of a shift beyond which a fit may be further off


def replay_align_pairs(folder: Path) -> Iterator[Check]:
    """Verdicts, and shift, scale and turn where the truth is known."""
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]:
        source, edited = (np.asarray(Image.open(folder / case[side]).convert("RGB")) for side in "ab")
        mask = np.asarray(Image.open(folder / case["mask"]).convert("L")) > 127 if case.get("mask") else None
        found, name = align(source, edited, mask), case["name"]
        if case["verdict"] != "undecided":
            yield Check(f"{name}: {case['verdict']}", float(found.verdict != case["verdict"]), 0)
        if case["name"].startswith("mirrored"):
            yield Check(f"{name}: said so", float(found.note != "mirrored"), 0)
        if case["truth"] is not None:
            yield from _displacement(name, found, case["truth"])


def _displacement(name: str, found: Alignment, truth: dict[str, float]) -> Iterator[Check]:
    is_far = max(abs(truth["dx"]), abs(truth["dy"])) > FAR
    for key, tolerance in (("dx", 0.1), ("dy", 0.1), ("sx", 0.001), ("sy", 0.001)):
        ours = getattr(found, key)
        yield Check(f"{name}: {key}", _off(ours, truth[key]), 3 * tolerance if is_far else tolerance)
    turn = None if found.rotation is None else abs(found.rotation)  # which way is positive is not recorded
    yield Check(f"{name}: rotation", _off(turn, abs(truth.get("rotation_degrees", 0.0))), 0.1)


def _off(ours: float | None, golden: float) -> float:
    return float("inf") if ours is None else abs(ours - golden)


def replay_audit(folder: Path) -> Iterator[Check]:
    """Every planted defect by name, no other error, and the shard that slipped."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    data = folder / "data" if (folder / "data").is_dir() else folder
    with tempfile.TemporaryDirectory() as out:
        found = audit(AuditConfig(url=str(data), out=out, engine="local"))
    of_rows: dict[str, set[str]] = {}
    errors: dict[str, set[str]] = {}
    for one in found.findings:
        if one.finding in ("off_by_one", ""):
            continue
        of_rows.setdefault(one.id, set()).add(one.finding)
        if one.severity == "error":
            errors.setdefault(one.id, set()).add(one.finding)
    for key, kinds in expected["findings"].items():
        yield Check(f"{key}: {', '.join(kinds) or 'sound'}", float(len(set(kinds) - of_rows.get(key, set()))), 0)
        yield Check(f"{key}: no other error", float(len(errors.get(key, set()) - set(kinds))), 0)
    strangers = set(errors) - set(expected["findings"])
    yield Check("no error of a row that has none", float(len(strangers)), 0)
    slipped = {Path(one.shard).name: one for one in found.findings if one.finding == "off_by_one"}
    for name, shard in expected.get("shards", {}).items():
        yield from _slipped(name, slipped.get(Path(name).name), shard)
    others = set(slipped) - {Path(name).name for name in expected.get("shards", {})}
    yield Check("no other shard slipped", float(len(others)), 0)


def _slipped(name: str, ours: Any, golden: dict[str, Any]) -> Iterator[Check]:
    yield Check(f"{name}: {golden['finding']}", float(ours is None), 0)
    if ours is not None:
        yield Check(f"{name}: first row", abs(ours.index - golden["first_row"]), 0)
        direction = golden["direction"].split("source i ")[-1].strip()
        yield Check(f"{name}: direction", float(f"source i {direction};" not in ours.detail), 0)


SETS: dict[str, Callable[[Path], Iterator[Check]]] = {"align_pairs": replay_align_pairs, "audit_mini": replay_audit}
"""By the beginning of the folder's name; others are told by their `cases.json` or `expected.json`."""


def set_of(path: Path) -> tuple[Callable[[Path], Iterator[Check]], Path] | None:
    """What replays a folder, or a file in one; None: it is none of these."""
    for folder in (path, *path.parents):
        if not folder.is_dir():
            continue
        for name, replay in SETS.items():
            if folder.name.startswith(name):
                return replay, folder
        if (folder / "cases.json").is_file():
            return replay_align_pairs, folder
        if (folder / "expected.json").is_file() and list(folder.rglob("*.parquet")):
            return replay_audit, folder
    return None
