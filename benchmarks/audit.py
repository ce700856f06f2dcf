"""What `shardedit audit` finds of planted defects, and of half pixels: `make audit-score` writes build/audit.json.

2,000 pairs of photographs, four edits of each source, in UltraEdit's columns; of every kind of defect 20. And 1,000
pairs more, laid on one another without a mask: a third as they are, a third shifted by half a pixel, a third zoomed by
0.2 %. A displaced pair counts as found where it is called misaligned or undecided: half a pixel is between the bounds.
At last edits of our own, of drawn faces by the bundled model, laid on their inputs outside of their masks.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.pairs import Displacement, MadePair, crop_of, decoded, displaced, edit, jpeg, pair, region
from pipeline.looking.results import RunFolder
from pipeline.pairs.alignment import align
from pipeline.pairs.audit import AuditConfig, audit
from pipeline.running.demo import demo_recipe, draw_input
from pipeline.running.driver import run
from pipeline.writing.rows import encode_mask

PAIRS, EDITS, SHARDS = 2000, 4, 8
ALIGNED = 1000
PLANTED = 20
OWN, WITHIN = 60, 0.1  # faces that are edited by the demo's recipe; pixels of the furthest corner
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source_image", IMAGE),
        ("edited_image", IMAGE),
        ("mask_image", IMAGE),
        ("edit_prompt", pa.string()),
    ]
)
Row = dict[str, Any]


def swapped(row: Row, rng: np.random.Generator, truth: MadePair) -> None:
    row["source_image"], row["edited_image"] = row["edited_image"], row["source_image"]


def missing(row: Row, rng: np.random.Generator, truth: MadePair) -> None:
    row[rng.choice(["source_image", "edited_image"])] = None


def identical(row: Row, rng: np.random.Generator, truth: MadePair) -> None:
    again = jpeg(decoded(truth.source), 80) if rng.random() < 0.5 else truth.source
    row["edited_image"] = {"bytes": again, "path": None}


def broken(row: Row, rng: np.random.Generator, truth: MadePair) -> None:
    damages = [truth.edited[: len(truth.edited) // 2], b"<html>404</html>", b""]
    row["edited_image"] = {"bytes": damages[rng.integers(3)], "path": None}


def beside(row: Row, rng: np.random.Generator, truth: MadePair) -> None:
    row["mask_image"] = {"bytes": encode_mask(~truth.mask), "path": None}


def uncaptioned(row: Row, rng: np.random.Generator, truth: MadePair) -> None:
    row["edit_prompt"] = [None, "", "   "][rng.integers(3)]


KINDS: dict[str, tuple[set[str], Callable[[Row, np.random.Generator, MadePair], None] | None]] = {
    "swapped": ({"swapped"}, swapped),
    "missing": ({"missing"}, missing),
    "duplicate": ({"duplicate_pair"}, None),
    "identical": ({"unchanged"}, identical),
    "shifted": ({"misaligned", "alignment_undecided"}, None),
    "zoomed": ({"misaligned", "alignment_undecided"}, None),
    "broken": ({"broken"}, broken),
    "mask_beside": ({"mask_misses_change"}, beside),
    "no_caption": ({"prompt_empty"}, uncaptioned),
}
"""What each planted kind may be called, and how it is planted; shifts and duplicates are made with the pair."""


def planted_rows(rng: np.random.Generator) -> tuple[list[Row], dict[str, str]]:
    """All rows, and the kind of defect by id. The fourth edit of a source has a defect, if any."""
    kinds = [kind for kind in KINDS for _ in range(PLANTED)]
    places = rng.choice(PAIRS // EDITS, len(kinds), replace=False)
    defects = dict(zip(map(int, places), kinds, strict=True))
    rows: list[Row] = []
    truth: dict[str, str] = {}
    for number in range(PAIRS // EDITS):
        photograph, top, left, side = crop_of(rng, 512)
        source = jpeg(photograph[top : top + side, left : left + side], int(rng.integers(85, 96)))
        for at in range(EDITS):
            kind = defects.get(number, "") if at == EDITS - 1 else ""
            by = displacement(kind, rng)
            mask = region(rng, side)
            edited = jpeg(edit(rng, displaced(photograph, top, left, side, by), mask), int(rng.integers(85, 96)))
            made = MadePair(source, edited, mask)
            row: Row = {
                "id": f"{number:04d}-{at}",
                "source_image": {"bytes": source, "path": None},
                "edited_image": {"bytes": edited, "path": None},
                "mask_image": {"bytes": encode_mask(mask), "path": None},
                "edit_prompt": f"Replace part {at} of picture {number}.",
            }
            if kind == "duplicate":
                row = {**rows[-1], "id": row["id"]}
                truth[rows[-1]["id"]] = kind
            elif (plant := KINDS[kind][1] if kind else None) is not None:
                plant(row, rng, made)
            if kind:
                truth[row["id"]] = kind
            rows.append(row)
    return rows, truth


def displacement(kind: str, rng: np.random.Generator) -> Displacement:
    """Half a pixel in any direction, or 0.2 %."""
    if kind == "shifted":
        angle = rng.uniform(0, 2 * math.pi)
        return Displacement(dx=0.5 * math.cos(angle), dy=0.5 * math.sin(angle))
    return Displacement(scale=float(rng.choice([0.998, 1.002]))) if kind == "zoomed" else Displacement()


def audited(folder: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Plant, look, and compare."""
    rows, truth = planted_rows(rng)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "set").mkdir(parents=True)
    for shard in range(SHARDS):
        some = rows[shard * PAIRS // SHARDS : (shard + 1) * PAIRS // SHARDS]
        path = folder / "set" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(some, schema=SCHEMA), path, row_group_size=100)
    began = cpu_seconds()
    result = audit(AuditConfig(url=str(folder / "set"), out=str(folder / "audit"), engine="local"))
    seconds = cpu_seconds() - began
    found: dict[str, set[str]] = {}
    alarms = []
    for one in result.findings:
        expected = KINDS[truth[one.id]][0] if one.id in truth else set()
        if one.finding in expected:
            found.setdefault(truth[one.id], set()).add(one.id)
        elif one.severity == "error" or one.finding in ("alignment_undecided", "swapped_suspect"):
            alarms.append((one.id, truth.get(one.id, ""), one.finding, one.detail))
    planted = Counter(truth.values())
    return {
        "pairs": len(rows),
        "planted": len(truth),
        "found": sum(map(len, found.values())),
        "false_alarms": len(alarms),
        "by_kind": {kind: {"planted": planted[kind], "found": len(found.get(kind, ()))} for kind in KINDS},
        "alarms": alarms[:20],
        "images_per_second_per_core": round(result.pictures / seconds, 1),
    }


def cpu_seconds() -> float:
    """Of this process and of those that it decodes in: others may use the machine, too."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + sum(one.user + one.system for one in children) + ended.ru_utime + ended.ru_stime


def aligned(rng: np.random.Generator) -> dict[str, Any]:
    """How many half pixels and 0.2 % are found, without a mask, and how many whole pairs are called displaced."""
    verdicts: dict[str, Counter[str]] = {kind: Counter() for kind in ("as_it_is", "shifted", "zoomed")}
    for number in range(ALIGNED):
        kind = list(verdicts)[number % 3]
        made = pair(rng, displacement(kind, rng))
        verdicts[kind][align(decoded(made.source), decoded(made.edited)).verdict] += 1
    displaced_ones = verdicts["shifted"] + verdicts["zoomed"]
    whole = verdicts["as_it_is"]
    return {
        "shift_recall": share(displaced_ones, ("misaligned", "undecided")),
        "shift_false_alarms": share(whole, ("misaligned", "undecided", "unrelated")),
        "verdicts": {kind: dict(counts) for kind, counts in verdicts.items()},
    }


def own_edits(folder: Path) -> dict[str, Any]:
    """How far the demo's edits lie from their inputs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw_input(folder, OWN)
    plain = demo_recipe(folder, engine="local")
    recipe = plain.model_copy(update={"sink": plain.sink.model_copy(update={"include_input": True})})
    run(recipe, progress="off")
    results = RunFolder(recipe.sink)
    found = []
    for portion in results.portions(results.figures(results.spans("data"))):
        for result in results.load(portion):
            mask = None if result.mask is None else decoded(result.mask)[..., 0] > 127
            found.append(align(decoded(result.input), decoded(result.image), mask))
    corners = np.array([one.corner_px for one in found if one.corner_px is not None])
    return {
        "own_edits": len(found),
        "own_edits_with_a_fit": len(corners),
        "own_edits_within_a_tenth": float((corners <= WITHIN).mean()) if len(corners) else None,
        "own_edits_furthest": float(corners.max()) if len(corners) else None,
        "own_verdicts": dict(Counter(one.verdict for one in found)),
    }


def share(counts: Counter[str], verdicts: tuple[str, ...]) -> float:
    """Of some verdicts."""
    return sum(counts[verdict] for verdict in verdicts) / sum(counts.values())


def main() -> int:
    """Print and write the score."""
    Image.init()
    score = audited(Path("build/audit"), np.random.default_rng(0)) | aligned(np.random.default_rng(1))
    score |= own_edits(Path("build/audit/own"))
    Path("build/audit.json").write_text(json.dumps(score, indent=1), encoding="utf-8")
    print(json.dumps(score, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
