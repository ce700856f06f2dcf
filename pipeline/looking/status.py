"""How far a run is and what failed, from its manifests: at any time, also while it is at work elsewhere."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.common.showing import public_url
from pipeline.reading.shards import shard_slug
from pipeline.reading.storage import FileSystem, open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import Committed, committed_units
from pipeline.writing.merged import Merged, Span
from pipeline.writing.run_record import RunRecord
from pipeline.writing.spans import rows_of
from pipeline.writing.summary import Summary, Totals

SHOWN_SHARDS = 5  # with the most failures
SHOWN_FAILURES = 10
FAILURE_COLUMNS = ("id", "edit", "method", "stage", "error_class", "message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run as its manifests tell it."""

    folder: str
    shards: int
    shards_done: int
    planned: int | None  # results asked for; None where no shard is done yet that it could be estimated from
    planned_is_estimate: bool  # from the bytes of the shards that are done
    so_far: Summary  # of the committed units
    worst_shards: tuple[tuple[str, int, str], ...]  # (shard, failed results, a quarantine file), most first
    failures: tuple[dict[str, str], ...]  # `FAILURE_COLUMNS` of the first failed results of these files

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status(sink: SinkConfig, record: RunRecord) -> Status:
    """Add up what is committed. Nothing is held but sums, and what failed by shard.

    Raises:
        SinkError: the folder cannot be read.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    merged = Merged(fs, root)
    totals, done = Totals(merged), Committed()
    failed: Counter[str] = Counter()
    first: dict[str, Span] = {}
    asked: Counter[str] = Counter()
    for manifest in committed_units(sink):
        totals.add(manifest)
        done.add(manifest)
        asked[manifest.shard] += manifest.counts.asked
        if manifest.counts.failed:
            failed[manifest.shard] += manifest.counts.failed
            if manifest.shard not in first:
                first[manifest.shard] = next(span for span in merged.spans(manifest) if span.kind == "quarantine")
    whole = [(path, size) for path, size, _ in record.input if done.has_whole_shard(shard_slug(path))]
    complete = len(whole) == len(record.input)
    worst = heapq.nsmallest(SHOWN_SHARDS, failed.items(), key=lambda item: (-item[1], item[0]))
    return Status(
        folder=public_url(sink.folder),
        shards=len(record.input),
        shards_done=len(whole),
        planned=totals.asked if complete else _estimate(record, whole, asked),
        planned_is_estimate=not complete,
        so_far=totals.summary(
            complete=complete, units_now=0, max_failed_fraction=record.recipe["run"]["max_failed_fraction"]
        ),
        worst_shards=tuple((shard, count, first[shard].path) for shard, count in worst),
        failures=tuple(_failures(fs, root, [first[shard] for shard, _ in worst])),
    )


def _estimate(record: RunRecord, whole: Sequence[tuple[str, int]], asked: Counter[str]) -> int | None:
    """Results of the whole input, where all shards are like those that are done."""
    sizes = sum(size for _, size in whole)
    if not sizes:
        return None
    return round(sum(asked[path] for path, _ in whole) * sum(size for _, size, _ in record.input) / sizes)


def _failures(fs: FileSystem, root: str, spans: Sequence[Span]) -> list[dict[str, str]]:
    """The first failed results of some units, without their bytes."""
    found: list[dict[str, str]] = []
    each = max(1, SHOWN_FAILURES // max(1, len(spans)))
    for span in spans:
        found += rows_of(fs, root, span, FAILURE_COLUMNS)[:each]
    return found
