"""The rows of runs that recorded: which there are, and what blocks wrote, read column by column."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.common.showing import public_url
from pipeline.errors import SinkError
from pipeline.looking.results import RunFolder
from pipeline.recipe import SinkConfig, recipe_from
from pipeline.recordings import ATTENDED, RecordingKey
from pipeline.studies.sae.config import Recordings
from pipeline.writing.merged import Span
from pipeline.writing.recorded_columns import RECORDED, attended_of, recorded_of
from pipeline.writing.spans import table_of


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one unit."""

    run: int  # of the folders
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What all recordings must have in common."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedImage:
    """One image, and what blocks wrote while it was sampled."""

    id: str
    prompt: str
    pixels: np.ndarray  # (H, W, 3) uint8, finished
    maps: dict[RecordingKey, Tensor]  # (D, h', w') each; whole ones alone
    attended: dict[str, np.ndarray]  # (h', w') by word, where that was recorded


class RecordedRuns:
    """The recordings of several runs.

    Raises:
        SinkError: a folder holds no recordings, or they are of different models, steps or sizes.
    """

    def __init__(self, config: Recordings) -> None:
        self.config = config
        self._folders = [
            RunFolder(SinkConfig(folder=folder, storage_options=config.storage_options)) for folder in config.folders
        ]

    @cached_property
    def keys(self) -> list[RecordingKey]:
        """What was recorded in all of them, and is wanted."""
        recorded = []
        for folder in self._folders:
            found = recipe_from(folder.record["recipe"]).recorded
            if not found:
                raise SinkError(
                    f"{public_url(folder.sink.folder)} is a run that recorded nothing. Give the folder of a "
                    "`shardedit sae collect` run (editing.record)"
                )
            recorded.append(found)
        common = [key for key in recorded[0] if all(key in other for other in recorded) and self.config.wants(key)]
        if not common:
            known = ", ".join(f"{key.block} at {key.time:g} ({key.branch})" for key in recorded[0])
            raise SinkError(f"recordings has none of what is wanted in all folders. The first folder has: {known}")
        return common

    @cached_property
    def attention(self) -> bool:
        """Whether all of them recorded where words were attended to."""
        return all(recipe_from(folder.record["recipe"]).records_attention for folder in self._folders)

    @cached_property
    def parts(self) -> list[Part]:
        """Where rows are, in an order that no merging changes."""
        found = [Part(number, span) for number, folder in enumerate(self._folders) for span in folder.spans("data")]
        if not found:
            raise SinkError("recordings holds no row. See `shardedit status` of the runs")
        return found

    @cached_property
    def model(self) -> Model:
        """Of all of them."""
        models: dict[Model, str] = {}
        for part in self.parts:
            folder = self._folders[part.run]
            for row in self._table(part, ("model", "model_digest")).to_pylist():
                models.setdefault(Model(name=row["model"], digest=row["model_digest"]), public_url(folder.sink.folder))
        if len(models) > 1:
            texts = [f"{where}: {one.name} ({one.digest})" for one, where in models.items()]
            raise SinkError(f"recordings of different models have no autoencoder in common:\n  {chr(10).join(texts)}")
        return next(iter(models))

    def timestep(self, key: RecordingKey) -> float:
        """Where a recording was made, the same in all rows.

        Raises:
            SinkError: it is not the same, or the shapes are not.
        """
        seen: dict[tuple[float, int], str] = {}
        for part in self.parts:
            for row in self._table(part, ("id", RECORDED)).to_pylist():
                said = _said(row, key)
                seen.setdefault((said["timestep"], said["shape"][0]), row["id"])
        if len(seen) > 1:
            texts = [f"timestep {where[0]:g}, {where[1]} channels ({row})" for where, row in seen.items()]
            raise SinkError(
                f"recordings of {key.block} at time {key.time:g} are not of one kind: {'; '.join(texts)}. Give runs of "
                "one inversion.num_steps and one model"
            )
        return next(iter(seen))[0]

    def vectors(self, part: Part, keys: Sequence[RecordingKey]) -> Iterator[tuple[str, dict[RecordingKey, Tensor]]]:
        """Of every row its id, and what each block wrote, (P, D)."""
        columns = [key.column for key in keys]
        table = self._table(part, ("id", RECORDED, *columns))
        numbers = {name: table.column(name).combine_chunks() for name in columns}
        for at, row in enumerate(table.select(["id", RECORDED]).to_pylist()):
            found = {}
            for key in keys:
                _said(row, key)  # or it has none
                _, array = recorded_of({**row, key.column: np.asarray(numbers[key.column][at].values)}, key.column)
                found[key] = torch.from_numpy(array)
            yield row["id"], found

    def images(self) -> Iterator[RecordedImage]:
        """Every image with its whole maps, unit by unit.

        Raises:
            SinkError: only some places of a map were recorded.
        """
        for part in self.parts:
            columns = ["id", "target_prompt", "source_prompt", "image", RECORDED]
            rows = self._table(part, [*columns, *([ATTENDED] if self.attention else [])]).to_pylist()
            for row, (_, recorded) in zip(rows, self.vectors(part, self.keys), strict=True):
                yield _image(row, {key: self._map(row, key, vectors) for key, vectors in recorded.items()})

    def pictures(self) -> Iterator[RecordedImage]:
        """Every image without its maps."""
        for part in self.parts:
            for row in self._table(part, ("id", "target_prompt", "source_prompt", "image")).to_pylist():
                yield _image(row, {})

    def _map(self, row: dict[str, Any], key: RecordingKey, vectors: Tensor) -> Tensor:
        channels, height, width = _said(row, key)["shape"]
        if len(vectors) < height * width:
            raise SinkError(
                f"{row['id']} has {len(vectors)} of {height * width} places of {key.block}, and labelling needs whole "
                "maps. Collect them with editing.record.positions none"
            )
        return vectors.mT.reshape(channels, height, width)

    def _table(self, part: Part, columns: Sequence[str]) -> Any:
        folder = self._folders[part.run]
        return table_of(folder.fs, folder.root, part.span, columns)

    def fingerprint(self) -> str:
        """Which rows there are: others are another training."""
        digest = hashlib.sha256()
        for part in self.parts:
            for row in self._table(part, ("id", "edit", "method", "recipe_hash")).to_pylist():
                digest.update("\x1f".join(map(str, row.values())).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def _image(row: dict[str, Any], maps: dict[RecordingKey, Tensor]) -> RecordedImage:
    return RecordedImage(
        id=row["id"],
        prompt=row["target_prompt"] or row["source_prompt"],
        pixels=np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")),
        maps=maps,
        attended=attended_of(row) if ATTENDED in row else {},
    )


def _said(row: dict[str, Any], key: RecordingKey) -> dict[str, Any]:
    """What a row says of one recording."""
    said = json.loads(row[RECORDED] or "{}").get(key.column)
    if said is None:
        raise SinkError(f"the row {row['id']} has no recording of {key.block} at time {key.time:g} ({key.branch})")
    found: dict[str, Any] = said
    return found
