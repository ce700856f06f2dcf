"""What a run will take, before it starts: images, results, network rows, bytes, time. Nothing is edited into the sink.

Network rows are not computed from formulas but counted: the very generators that edit an image run against a model that
answers with zeros. Time comes from a probe of the real model (probe.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.common.partition import WHOLE, Partition
from pipeline.looking.asking_servers import cost_at_most, requests_notes, without_servers
from pipeline.looking.counting import RowCounter
from pipeline.looking.probe import PROBE_SECONDS, Probe, probe_model
from pipeline.models.outline import memory_note, outline_of
from pipeline.reading.requests import asked_of
from pipeline.reading.rows import light
from pipeline.reading.shards import ReadTask, Shard
from pipeline.reading.units import count_rows, plan_reads, read_units
from pipeline.recipe import Recipe
from pipeline.running.preflight import check_captions, todo_of_plan
from pipeline.samples import ReadRow, Sample
from pipeline.settings.sections import RunConfig, WorkerRange

COUNTED_SHARDS = 64  # shards whose rows are counted; those of others are estimated from their bytes
READ_ROWS = 256  # rows that are read for their own edits
READ_BYTES = 256 * 2**20  # shards larger than this in all are not read beyond `READ_ROWS`
PROBE_IMAGES = 9  # the first warms up, the others are timed: so many that they fill calls of some methods
PROBE_BYTES = 64 * 2**20  # that these may hold
BEGUN = "this run has begun: `edit` goes on from what is committed, and the numbers are those of the whole run"
SHOWN_REASONS = 5  # why rows cannot be edited
SHOWN_LETTERS = 160  # of a reason
COUNTERS = 8  # shards counted side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run in numbers. `notes` says which numbers are estimates."""

    shards: int
    bytes_in: int
    images: int
    edits: tuple[str, ...]  # the job's
    methods: tuple[str, ...]
    results: int  # (image, edit, method) asked for
    network_rows: int
    requests: int | None  # to servers; None: no method asks one
    cost_at_most: float | None  # of these, each made as often as it may be; None: the recipe does not tell
    workers: int
    bytes_out: int | None  # None without a probe
    seconds: float | None  # on `workers` workers like this machine; None without a probe
    probe: Probe | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def plan(recipe: Recipe, *, probe: bool = True, partition: Partition = WHOLE) -> Plan:
    """Look at the source, count, and probe the model.

    Args:
        recipe: the run.
        probe: load the model and time it; without, there is no estimate of time and output bytes.
        partition: which of its shards.

    Raises:
        RecipeError: the captions are to be the source prompts, and are not where the recipe says.
        SourceError: there is nothing to read.
        SinkError: the sink would end the run before it begins.
        ModelError: the model cannot be loaded.
    """
    todo = todo_of_plan(recipe, partition)
    shards = partition.of(todo.shards)
    images, images_note = count_images(shards, recipe)
    looked = look_at_rows(shards, recipe, images)
    cost, rows, complete = looked.cost, looked.rows, looked.complete
    scale = 1.0 if complete else images / max(len(rows), 1)
    results, network_rows = round(cost.results * scale), round(cost.network_rows * scale)
    asked = {name: round(number * scale) for name, number in cost.requests.items()}
    notes = [recipe.model.caveat, todo.left_out, images_note, cost.note(len(rows), complete)]
    notes.append(check_captions(rows, shards, recipe))
    notes.append(memory_note(recipe.model, outline_of(recipe.model)))
    if recipe.best_of is not None:
        notes.append(
            f"results and network rows are of first attempts; best_of makes up to {recipe.best_of.attempts} of each"
        )
    if todo.before is not None:
        notes.append(BEGUN)
    notes += requests_notes(asked, recipe)
    workers, more = assumed_workers(recipe.run)
    measured, probed = None, without_servers(recipe)
    if probe and probed is None:
        notes.append("time and output: unknown, every method asks a server")
    if probe and probed is not None:
        why: list[str] = []
        per_image = cost.results / max(len(rows), 1)
        measured = probe_model(probed, looked.to_probe, per_image, why) if looked.to_probe else None
        notes.append(probe_note(measured, why))
        if measured is not None and more is not None:
            share = f"{workers / more:.0%}"
            notes.append(
                f"time counts on {workers} worker(s), run.workers.min; {more}, run.workers.max, take {share} of it"
            )
    return Plan(
        shards=len(shards),
        bytes_in=sum(shard.size for shard in shards),
        images=images,
        edits=tuple(recipe.edits),
        methods=tuple(recipe.all_methods),
        results=results,
        network_rows=network_rows,
        requests=sum(asked.values()) if recipe.asks_servers else None,
        cost_at_most=cost_at_most(asked, recipe),
        workers=workers,
        bytes_out=None
        if measured is None or measured.bytes_per_result is None
        else round(results * measured.bytes_per_result),
        seconds=None if measured is None else seconds_for(network_rows, images, measured, workers),
        probe=measured,
        notes=tuple(note for note in notes if note),
    )


def assumed_workers(run: RunConfig) -> tuple[int, int | None]:
    """Workers that an estimate of time counts on, and the most that a growing pool may have."""
    if run.engine == "local":
        return 1, None
    if isinstance(run.workers, WorkerRange):
        return run.workers.min, run.workers.max
    return run.workers if isinstance(run.workers, int) else max(torch.cuda.device_count(), 1), None


def seconds_for(network_rows: int, images: int, probe: Probe, workers: int) -> float:
    """Full network calls, and what each image takes beside them, over the workers."""
    calls = math.ceil(network_rows / probe.call_size)
    device = calls * probe.seconds_per_call + images * probe.seconds_per_image
    host = images * probe.host_seconds_per_image
    return (max(device, host) if probe.overlaps else device + host) / workers


def probe_note(probe: Probe | None, why: Sequence[str] = ()) -> str:
    """What an estimate of time is based on, and why some rows could not be edited."""
    reasons = ", ".join(f"{text} ({count})" for text, count in Counter(map(_in_short, why)).most_common(SHOWN_REASONS))
    if probe is None:
        return "time: unknown, none of the first rows can be edited" + (f": {reasons}" if reasons else "")
    failed = f"; {len(why)} of the results that were tried failed: {reasons}" if reasons else ""
    length = f"{probe.images} image(s)" if probe.images else f"the first {PROBE_SECONDS:.0f} s of an image"
    basis = (
        f"time and output: from {length} on this machine ({probe.device}), extrapolated by network rows in full calls"
    )
    return basis + failed


def count_images(shards: Sequence[Shard], recipe: Recipe) -> tuple[int, str]:
    """Rows of the source, without decoding any; and how they were counted."""
    chosen = shards
    if len(shards) > COUNTED_SHARDS:
        chosen = [shards[at * len(shards) // COUNTED_SHARDS] for at in range(COUNTED_SHARDS)]
    with ThreadPoolExecutor(COUNTERS) as pool:
        counted = sum(pool.map(lambda shard: count_rows(shard, recipe.source), chosen))
    if len(chosen) == len(shards):
        return counted, ""
    share = sum(shard.size for shard in chosen) / max(sum(shard.size for shard in shards), 1)
    return round(counted / share), f"images: estimated from {len(chosen)} of {len(shards):,} shards, by their bytes"


@dataclass(slots=True)
class Cost:
    """What some rows ask for."""

    results: int = 0
    network_rows: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # to servers, by method, if each answers at once
    own_edits: int = 0  # rows that bring an edit of their own
    unusable: int = 0  # rows of which something that was asked for cannot be made
    reasons: Counter[str] = field(default_factory=Counter)  # why, by rows

    def note(self, rows: int, complete: bool) -> str:
        """How these numbers came about."""
        basis = "counted over all rows" if complete else f"estimated from the first {rows:,} rows"
        parts = [f"results and network rows: {basis}"]
        if self.own_edits:
            parts.append(f"{self.own_edits:,} of {rows:,} bring their own edit")
        if self.unusable:
            known = [f"{reason} ({count:,})" for reason, count in self.reasons.most_common(SHOWN_REASONS)]
            others = len(self.reasons) - len(known)
            more = f", and {others:,} other reason(s)" if others else ""
            parts.append(f"{self.unusable:,} of {rows:,} rows cannot be edited as asked: {', '.join(known)}{more}")
        return "; ".join(parts)

    def cannot(self, reasons: Iterable[str]) -> None:
        """Count a row that cannot be edited, for these reasons."""
        distinct = set(reasons)
        self.unusable += bool(distinct)
        self.reasons.update(distinct)


@dataclass(slots=True)
class Looked:
    """Rows whose edits were looked at. Their pictures are not kept, but for those that a probe edits."""

    cost: Cost = field(default_factory=Cost)
    rows: list[ReadRow] = field(default_factory=list)
    to_probe: list[Sample] = field(default_factory=list)
    complete: bool = False  # whether these are all

    @property
    def probes_more(self) -> bool:
        """Whether another sample is of use to the probe."""
        few = len(self.to_probe) < PROBE_IMAGES and sum(sample.nbytes for sample in self.to_probe) < PROBE_BYTES
        return few or len(self.to_probe) < 2


def look_at_rows(shards: Sequence[Shard], recipe: Recipe, images: int) -> Looked:
    """Look at all rows of a small source, or at the first ones of a large one. Memory: one unit's rows."""
    read_all = images <= READ_ROWS and sum(shard.size for shard in shards) <= READ_BYTES
    looked = Looked()
    offers = outline_of(recipe.model).offers
    counter = RowCounter(recipe, told_guidance=offers is not None and offers.embedded_guidance)
    for task in plan_reads(shards, recipe.run.unit_size, _nothing, _nothing):
        for row in _rows_of(task, recipe):
            add_cost(looked.cost, row, recipe, counter)
            looked.rows.append(light(row))
            if isinstance(row, Sample) and looked.probes_more:
                looked.to_probe.append(row)
            if not read_all and len(looked.rows) == READ_ROWS:
                return looked
    looked.complete = True
    return looked


def _nothing(_: str) -> bool:
    return False


def _rows_of(task: ReadTask, recipe: Recipe) -> Iterator[ReadRow]:
    for unit in read_units(task, recipe.source, recipe.run.unit_size, _nothing):
        yield from unit.rows


def add_cost(cost: Cost, row: ReadRow, recipe: Recipe, counter: RowCounter) -> None:
    """Add what a row asks for."""
    asked = asked_of(row, recipe)
    cost.results += len(asked.edits) * len(recipe.all_methods)
    cost.own_edits += asked.sample.edits is not None
    if asked.refusal is not None:
        cost.cannot([_in_short(asked.refusal.message)])
        return
    requests, masked = asked.requests, asked.sample.mask is not None
    refused = {
        (edit, name): problems
        for edit, request in requests.items()
        for name, method in recipe.all_methods.items()
        if (problems := tuple(method.editing.problems_of_row(request, method.inversion, masked=masked)))
    }
    for name, method in recipe.all_methods.items():
        if method.editing.server is not None:
            cost.requests[name] += sum((edit, name) not in refused for edit in requests)
    cost.cannot(problem.reason for problems in refused.values() for problem in problems)
    cost.network_rows += counter.rows(requests, masked=masked, refused=frozenset(refused))


def _in_short(message: str) -> str:
    """The first sentence of a row's message, to count rows by; a later one says what to do."""
    return message.split(". ")[0][:SHOWN_LETTERS]
