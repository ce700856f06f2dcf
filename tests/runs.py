"""What the tests of whole runs share: small shards, a recipe for the closed-form model, and how to compare two runs."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.writing.files import is_temporary

EDITS = ("b", "a")
MORE_DIGITS = re.compile(r"(?<=-[0-9a-f]{8})(?:[0-9a-f]{8})+(?=\.)")  # of a merged file's name
GENERATION = re.compile(r"-\d{8}(?=\.(?:json|parquet|tar)\b)")
SECRET = "PLANTED-SECRET-4711"


def png(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A picture of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, *, shards: int, rows: int, damaged: Container[int] = (3,)) -> Path:
    """Tars `s0.tar`, ... of images `im00`, ...; those whose number over all shards is in `damaged` are no images."""
    folder.mkdir(parents=True)
    number = 0
    for shard in range(shards):
        with tarfile.open(folder / f"s{shard}.tar", "w") as tar:
            for _ in range(rows):
                image = b"no image" if number in damaged else png(number)
                for name, data in ((f"im{number:02d}.png", image), (f"im{number:02d}.txt", b"a caption")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    return folder


def asked(*, shards: int, rows: int) -> Counter[tuple[str, str, str]]:
    """Every (id, edit, method) of `write_shards` under `recipe_data`, once."""
    return Counter(
        (f"s{number // rows}.tar/im{number:02d}", edit, "ledits_pp")
        for number in range(shards * rows)
        for edit in EDITS
    )


def recipe_data(
    source: Path | str, out: Path | str, *, sink: dict[str, Any] | None = None, **run: Any
) -> dict[str, Any]:
    """A recipe as plain data: two edits, units of two images, few steps."""
    return {
        "source": {"shards": str(source)},
        "edits": {name: {"concepts": [{"prompt": f"concept {name}"}]} for name in EDITS},
        "model": {"name": "analytic", "size": 32},
        "inversion": {"method": "ddpm", "num_steps": 4},
        "sink": {"folder": str(out), **(sink or {})},
        "run": {"unit_size": 2, "call_size": 4, **run},
    }


def contents(folder: Path) -> dict[str, Any]:
    """What a run has written and must be equal in every run: files by path; manifests without what they measured.

    Not what a kill left of a write: temporary files, which count for nothing. Nor the generations of drivers, and the
    digits that a name takes beyond eight while a driver that was killed might still remove the shorter one: of two
    files that differ in these alone, the second keeps them.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if is_temporary(name):
            continue
        plain = MORE_DIGITS.sub("", GENERATION.sub("", name))
        if plain not in found:
            name = plain
        if name.startswith(("data/", "rejected/", "quarantine/", "_parts/", "_output/data/", "_output/quarantine/")):
            if path.is_file() and name.endswith(".json"):
                found[name] = MORE_DIGITS.sub("", path.read_text()).encode()
            elif path.is_file():
                found[name] = path.read_bytes()
        elif name.startswith(("_units/", "_output/index")) and path.is_file():
            about = json.loads(MORE_DIGITS.sub("", GENERATION.sub("", path.read_text())))
            about.pop("generation")
            about.pop("dying", None)
            about.pop("measured", None)
            found[name] = about
    return found


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of data and quarantine (Parquet), by file; without the recipe's hash, in which the input's URL is."""
    found = {}
    for path in (*folder.glob("data/*.parquet"), *folder.glob("quarantine/*.parquet")):
        table = pq.read_table(path)
        table = table.select([name for name in table.column_names if name != "recipe_hash"])
        found[path.relative_to(folder).as_posix()] = table.to_pylist()
    return found


def rows_on_any_store(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The same, by names without the digits of files' contents, which hold the recipe's hash."""
    return {re.sub(r"-[0-9a-f]{8}(?=\.)", "", name): found for name, found in rows(folder).items()}


def results(folder: Path) -> Counter[tuple[str, str, str]]:
    """Every (id, edit, method) in data and quarantine (Parquet), with how often it is there."""
    count: Counter[tuple[str, str, str]] = Counter()
    for path in (*(folder / "data").glob("*.parquet"), *(folder / "quarantine").glob("*.parquet")):
        table = pq.read_table(path, columns=["id", "edit", "method"])
        count.update(tuple(row.values()) for row in table.to_pylist())  # type: ignore[misc]
    return count
