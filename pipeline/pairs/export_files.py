"""The files of an export: names as hubs have them, and their rows, each made when it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
from webdataset import TarWriter

from pipeline.errors import EncodeError, SinkError
from pipeline.pairs.plan import Item, Plan
from pipeline.pairs.presets import OF_GATES, OF_MASKS, Columns, Entry, Preset, extras_of, key_of, of_run
from pipeline.pairs.results import Place, Results, is_accepted, name_of
from pipeline.pairs.signing import Signer
from pipeline.writing.parquet import parquet_writer, regroup

Numbered = tuple[int, Item]


class ExportFiles:
    """What is written to `data/`.

    Args:
        preset: whose columns or members the rows have.
        results: of the runs.
        plan: what goes into which split.
        shard_bytes: of pictures in a file, about.
        mask_rle: whether masks become run lengths, too.
        with_rejected: whether columns say what gates rejected.
        score: name of what decided pairs of preference.
        signer: signs every result; None: none is signed.
    """

    def __init__(
        self,
        preset: Preset,
        results: Results,
        plan: Plan,
        *,
        shard_bytes: int,
        mask_rle: bool = False,
        with_rejected: bool = False,
        score: str = "",
        signer: Signer | None = None,
    ) -> None:
        self._preset, self._results, self._plan = preset, results, plan
        self._mask_rle, self._with_rejected, self._score, self._signer = mask_rle, with_rejected, score, signer
        extras: Columns = {**(OF_MASKS if mask_rle else {}), **(OF_GATES if with_rejected else {})}
        self.schema = preset.schema(extras) if preset.row is not None else None
        self._parts = dict(_parts(plan.splits, shard_bytes))

    @property
    def names(self) -> Mapping[str, int]:
        """Rows of each file, in the order in which files are written."""
        return {
            f"{part}.{suffix}": len(items) for part, items in self._parts.items() for suffix in self._preset.suffixes
        }

    def of_split(self, split: str) -> list[str]:
        """Files of a split that `datasets` reads: where tables name the members of tars, the tables."""
        suffix = self._preset.suffixes[-1]
        return [f"{part}.{suffix}" for part in self._parts if part.startswith(f"{split}-")]

    def write(self, name: str, file: BinaryIO) -> None:
        """Write a file."""
        part, _, suffix = name.rpartition(".")
        entries = self._entries(self._parts[part])
        if suffix == "tar":
            assert self._preset.members is not None, "a tar has members"
            with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
                for entry in entries:
                    writer.write(self._preset.members(entry))
            return
        assert self._preset.row is not None, "a table has rows"
        rows = ({**self._preset.row(entry), **entry.extras} for entry in entries)
        batches = (pa.RecordBatch.from_pylist([row], schema=self.schema) for row in rows)
        with parquet_writer(file, self.schema) as parquet:
            for table in regroup(batches, self.schema):
                parquet.write_table(table)

    def _entries(self, items: Sequence[Numbered]) -> Iterator[Entry]:
        for number, item in items:
            row = self._shown(item.place)
            accepted = is_accepted(item.place, row) if self._with_rejected else None
            yield Entry(
                row=row,
                key=key_of(row, item.place.run),
                name=name_of(row) + of_run(item.place.run),
                number=number,
                captions=self._plan.captions,
                worse=None if item.worse is None else self._shown(item.worse),
                score=item.score,
                worse_score=item.worse_score,
                score_name=self._score,
                extras=extras_of(row, accepted=accepted, with_rle=self._mask_rle),
            )

    def _shown(self, place: Place) -> dict[str, Any]:
        row = self._results.shown(place)
        if self._signer is None:
            return row
        try:
            signed = self._signer.sign(row["image"]["bytes"], row["input"]["bytes"])
        except EncodeError as error:
            raise SinkError(f"{name_of(row)}: {error}. What is written stays; the same command goes on") from error
        return row | {"image": {**row["image"], "bytes": signed}}


def _parts(splits: Mapping[str, Sequence[Item]], shard_bytes: int) -> Iterator[tuple[str, list[Numbered]]]:
    """Names without suffix, and what goes into each."""
    number = 0
    for split, items in splits.items():
        parts: list[list[Numbered]] = []
        held = 0
        for item in items:
            if not parts or held >= shard_bytes:
                parts.append([])
                held = 0
            parts[-1].append((number, item))
            held += item.size
            number += 1
        yield from ((f"{split}-{at:05d}-of-{len(parts):05d}", part) for at, part in enumerate(parts))
