"""Shards and images that the reading tests are made of."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.reading import storage, units
from pipeline.reading.units import list_shards, plan_reads, read_units
from pipeline.recipe import Recipe, SourceConfig
from pipeline.samples import ReadRow, UnitInput, Unreadable

Member = tuple[str, bytes]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(storage, "LONGEST_WAIT", 0.0)


def _png(seed: int, height: int = 6, width: int = 5) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _tar_bytes(members: Iterable[Member], *, kind: int = tarfile.GNU_FORMAT, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _samples(count: int) -> list[Member]:
    """`count` samples of image, edit request and caption, as sorted archives have them."""
    members: list[Member] = []
    for number in range(count):
        request = {"edit": {"concepts": [{"prompt": f"hat {number}"}]}, "number": number}
        members += [
            (f"{number:04d}.json", json.dumps(request).encode()),
            (f"{number:04d}.png", _png(number)),
            (f"{number:04d}.txt", f"face {number}".encode()),
        ]
    return members


def _read_all(source: SourceConfig, unit_size: int = 3, committed: Iterable[str] = ()) -> list[UnitInput]:
    done = set(committed)
    tasks = plan_reads(list_shards(source), unit_size, done.__contains__, lambda _: False)
    return [unit for task in tasks for unit in read_units(task, source, unit_size, done.__contains__)]


@pytest.fixture
def png() -> Callable[..., bytes]:
    """`png(seed, height, width)`: a small random picture."""
    return _png


@pytest.fixture
def tar_bytes() -> Callable[..., bytes]:
    """`tar_bytes([(name, data), ...])`: an archive."""
    return _tar_bytes


@pytest.fixture
def samples() -> Callable[[int], list[Member]]:
    """`samples(count)`: members of `count` samples with json, png and txt."""
    return _samples


@pytest.fixture
def read_all() -> Callable[..., list[UnitInput]]:
    """`read_all(source, unit_size, committed)`: every unit that is left of a source."""
    return _read_all


@pytest.fixture
def read_tar(tmp_path: Path) -> Callable[..., list[ReadRow]]:
    """`read_tar(data, **source_settings)`: the rows of one archive."""

    def read(data: bytes, name: str = "shard.tar", **settings: Any) -> list[ReadRow]:
        (tmp_path / name).write_bytes(data)
        source = SourceConfig(shards=(str(tmp_path / name),), format="webdataset", **settings)
        units = _read_all(source, unit_size=3)
        assert [unit.unit.is_last for unit in units] == [False] * (len(units) - 1) + [True]
        rows = [row for unit in units for row in unit.rows]
        assert [(row.sample if isinstance(row, Unreadable) else row).index for row in rows] == list(range(len(rows)))
        return rows

    return read


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, by shard, the bytes that the reader takes out of the files it opens."""
    counter: Counter[str] = Counter()
    original = units._open

    def opened(shard: Any, *args: Any, **kwargs: Any) -> Any:
        file = original(shard, *args, **kwargs)

        class Counting:
            def read(self, count: int = -1) -> bytes:
                data: bytes = file.read(count)
                counter[shard.path] += len(data)
                return data

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Counting()

    monkeypatch.setattr(units, "_open", opened)
    return counter


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """`make_recipe(fit=..., source=..., edits=...)`: a recipe with one edit, unless told otherwise."""

    def make(*, fit: str = "pad", source: dict[str, Any] | None = None, edits: Any = None) -> Recipe:
        return Recipe.model_validate(
            {
                "source": {"shards": "nowhere", **(source or {})},
                "edits": {"concepts": [{"prompt": "hat"}]} if edits is None else edits,
                "model": {"name": "analytic", "fit": fit},
                "sink": {"folder": "nowhere"},
            }
        )

    return make
