"""What is left to do: compares the sink's record with the recipe, and the input's listing with the committed units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.common.partition import WHOLE, Partition
from pipeline.engine.backbone import ModelRecord
from pipeline.reading.listing import list_source
from pipeline.reading.shards import ReadTask, Shard, shard_slug
from pipeline.reading.units import plan_reads
from pipeline.recipe import Recipe
from pipeline.running.tally import Extent
from pipeline.writing.baseline import Counted
from pipeline.writing.commit import Committed, committed_shards
from pipeline.writing.run_record import RunRecord, check_same_run, read_run_record, run_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Todo:
    """A run that is about to start or to go on, or one partition of it."""

    shards: list[Shard]  # of the whole run
    left_out: str  # what the source holds beside them, in a line; "" for nothing
    before: RunRecord | None  # of the run that is being continued
    only: frozenset[str] | None  # slugs of the shards that the rest is about; None: of all
    committed: Committed
    extent: Extent
    tasks: list[ReadTask]  # what is left to read; empty where everything is committed
    counted: Counted  # every unit that is committed, those with failures too
    noise: tuple[str, ...]  # files of commits that do not count

    def left_after(self, committed: Committed, unit_size: int) -> list[ReadTask]:
        """What is still left to read when more has been committed since the start."""
        part = [shard for shard in self.shards if self.only is None or shard_slug(shard.path) in self.only]
        return _tasks(part, unit_size, committed)


def find_todo(recipe: Recipe, *, retry_failed: bool = False, partition: Partition = WHOLE) -> Todo:
    """List what there is and take off what is done. Writes nothing.

    Args:
        recipe: the run.
        retry_failed: units in which anything failed are not done.
        partition: whose shards to do; those of others are listed, and left alone.

    Raises:
        SourceError: there is nothing to read.
        SinkError: the sink cannot be read, or belongs to another run; lists the differences.
    """
    before = read_run_record(recipe.sink)
    source = list_source(recipe.source)
    shards = source.shards
    if before is not None:
        # Which model it is shows only once it is loaded: `driver.run` compares it later.
        same_model = ModelRecord(**before.model)
        now = run_record(recipe, shards, same_model, before.call_size, before.threads, before.tuned)
        check_same_run(before, now, recipe.sink)
    part = partition.of(shards)
    only = None if partition == WHOLE else frozenset(shard_slug(shard.path) for shard in part)
    committed, counted = Committed(), Counted()
    images = Counter[str]()
    noise: list[str] = []
    for shard in committed_shards(recipe.sink, only=only) if before is not None else ():
        noise += shard.noise
        for manifest in shard.manifests:
            counted.add(manifest)
            if retry_failed and manifest.counts.failed:
                continue
            committed.add(manifest)
            images[shard.slug] += manifest.counts.images
    return Todo(
        shards=shards,
        left_out=source.note(),
        before=before,
        only=only,
        committed=committed,
        extent=_extent(part, committed, images),
        tasks=_tasks(part, recipe.run.unit_size, committed),
        counted=counted,
        noise=tuple(noise),
    )


def _tasks(shards: Sequence[Shard], unit_size: int, committed: Committed) -> list[ReadTask]:
    return plan_reads(
        shards, unit_size, committed.has, lambda shard_path: committed.has_whole_shard(shard_slug(shard_path))
    )


def _extent(shards: Sequence[Shard], committed: Committed, images: Counter[str]) -> Extent:
    """How large the run is. `images` are those that are committed, by shard."""
    rows = [shard.rows for shard in shards]
    whole = [shard for shard in shards if committed.has_whole_shard(shard_slug(shard.path))]
    return Extent(
        rows=None if None in rows else sum(count for count in rows if count is not None),
        bytes=sum(shard.size for shard in shards),
        shards=len(shards),
        committed=Committed(dict(committed.chunks), dict(committed.last)),  # its own: a tally adds to it
        whole_shards=len(whole),
        whole_images=sum(images.pop(shard_slug(shard.path), 0) for shard in whole),
        whole_bytes=sum(shard.size for shard in whole),
        images=images,
    )
