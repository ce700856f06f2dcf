"""Results wait as pixels until they are encoded: only so many may; and what large rows leave in files."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.reading import ahead
from pipeline.recipe import SinkConfig
from pipeline.records import Decoded, Placement, Prepared, Rejected
from pipeline.samples import Sample
from pipeline.writing import encoding
from pipeline.writing.encoding import Encoders
from pipeline.writing.parquet import BYTES_PER_GROUP, render_parquet
from pipeline.writing.rows import schema, shared_columns

LIMIT = 300  # bytes


def a_result(width: int) -> Decoded:
    whole, pixels = (1, width), np.zeros((1, width, 3), dtype=np.uint8)
    prepared = Prepared(
        sample=Sample(id="a", shard="", key="a", index=0, image=b""),
        original=pixels,
        pixels=pixels,
        placement=Placement(original=whole, crop=(0, 0, *whole), scaled=whole, offset=(0, 0), canvas=whole),
        mask=None,
        allowed=None,
        requests={},
    )
    return Decoded(prepared=prepared, edit="e", method="m", pixels=pixels, round_trip=pixels, masks=None, seed=1)


@pytest.mark.parametrize(("width", "most"), [(60, 1), (34, 3), (1, 3)])
def test_of_large_results_one_waits_at_a_time_and_of_small_ones_a_few(
    width: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ahead, encoding):
        monkeypatch.setattr(module, "HELD_BYTES", LIMIT)
    monkeypatch.setattr(encoding, "WAITING", 1)
    encoded: list[Decoded | Rejected] = []
    held: list[int] = []  # results that are not encoded, at each that is asked for, with it
    is_late = threading.Event()

    def results() -> Iterator[Decoded]:
        for at in range(12):
            held.append(at + 1 - len(encoded))
            yield a_result(width)

    def encode(result: Decoded | Rejected) -> dict[str, object]:
        is_late.wait(0.02)  # so that results pile up as far as they may
        encoded.append(result)
        return {}

    encoders = Encoders(threads=2)
    assert len(encoders.map(encode, results())) == 12
    encoders.close()
    assert max(held) == most


def test_image_columns_carry_no_statistics_and_row_groups_of_large_rows_are_small() -> None:
    sink = SinkConfig(folder="out")
    columns = schema(sink)
    row: dict[str, object] = dict.fromkeys(columns.names)
    row |= {"id": "a", "image": {"bytes": bytes(BYTES_PER_GROUP // 2 - 1000), "path": "a.png"}}
    metadata = pq.read_metadata(pa.BufferReader(render_parquet([row] * 3, columns, shared_columns(sink))))
    assert [metadata.row_group(at).num_rows for at in range(metadata.num_row_groups)] == [2, 1]
    group = metadata.row_group(0)
    with_statistics = {
        group.column(at).path_in_schema: group.column(at).is_stats_set for at in range(group.num_columns)
    }
    assert with_statistics["id"]
    assert not with_statistics["image.bytes"]
    assert not with_statistics["masks.list.element.bytes"]
