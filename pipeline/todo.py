"""What is left to do: the sink's record against the recipe, the input's listing against the committed units."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.models.backbone import ModelRecord
from pipeline.reading.listing import list_source
from pipeline.reading.shards import ReadTask, Shard, shard_slug
from pipeline.reading.units import plan_reads
from pipeline.recipe import Recipe
from pipeline.writing.commit import Committed, committed_units
from pipeline.writing.run_record import RunRecord, check_same_run, read_run_record, run_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Todo:
    """A run that is about to start, or to go on."""

    shards: list[Shard]
    left_out: str  # what the source holds beside them, in a line; "" for nothing
    before: RunRecord | None  # of the run that is being continued
    committed: Committed
    units_before: int
    tasks: list[ReadTask]  # what is left to read; empty where everything is committed
    units_known: int | None  # units of the whole run; None where only reading can tell, as with tar
    retry_failed: bool = False  # units with failures are among what is left, and replace their earlier commits

    @property
    def shards_before(self) -> int:
        """Shards that need no more work."""
        return sum(self.committed.has_whole_shard(shard_slug(shard.path)) for shard in self.shards)


def find_todo(recipe: Recipe, *, retry_failed: bool = False) -> Todo:
    """List what there is and take off what is done. Writes nothing.

    Args:
        recipe: the run.
        retry_failed: units in which anything failed are not done.

    Raises:
        SourceError: there is nothing to read.
        SinkError: the sink cannot be read, or belongs to another run; lists the differences.
    """
    before = read_run_record(recipe.sink)
    source = list_source(recipe.source)
    shards = source.shards
    if before is not None:
        # What the model is shows only once it is loaded: `cluster.run` looks at that later.
        same_model = ModelRecord(**before.model)
        check_same_run(before, run_record(recipe, shards, same_model, before.call_size, before.threads), recipe.sink)
    committed = Committed()
    units = 0
    if before is not None:
        for manifest in committed_units(recipe.sink):
            if retry_failed and manifest.counts.failed:
                continue
            committed.add(manifest)
            units += 1
    tasks = plan_reads(
        shards,
        recipe.run.unit_size,
        committed.has,
        lambda shard_path: committed.has_whole_shard(shard_slug(shard_path)),
    )
    rows = [shard.rows for shard in shards]
    size = recipe.run.unit_size
    known = None if None in rows else sum(-(-count // size) for count in rows if count is not None)
    return Todo(
        shards=shards,
        left_out=source.note(),
        before=before,
        committed=committed,
        units_before=units,
        tasks=tasks,
        units_known=known,
        retry_failed=retry_failed,
    )
