"""READ FIRST. One unit of work on its way, top to bottom; every other folder serves a line of this file.

    reading    a chunk of one shard becomes samples; each is asked what to change, decoded and fitted to the model
    inversion  pixels become a trajectory, once per image and inversion setting (one_image.py)
    editing    a trajectory and a request become edited latents and masks
    writing    results are restored to their original's size, encoded, and finished as the unit's files and manifest

`edit_unit` is the whole of it. What comes before (which units are left) and after (the commit) stands in running/, and
so does what wraps it: attempts that count deaths, a gate, a meter (running/worker.py). Inversions and edits are
generators over one image that ask for model calls; the engine runs those of many images at once (engine/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.best_of import best_of
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.errors import AnswerError, ClusterError
from pipeline.gating.gain import gain_seed_of
from pipeline.gating.inverting import KeptInversions
from pipeline.one_image import Setup, edit_prepared
from pipeline.reading.ahead import Ahead
from pipeline.reading.decoder import Decodes
from pipeline.reading.directions import stored_directions
from pipeline.reading.libraries import libraries_of
from pipeline.reading.prepare import prepare
from pipeline.reading.requests import asked_of, refusal_by
from pipeline.recipe import Recipe
from pipeline.records import Asked, Decoded, Edited, Prepared, Rejected
from pipeline.remote.pictures import Spent, added
from pipeline.samples import UnitInput
from pipeline.seeds import run_seed_of
from pipeline.settings.gates import Bounds
from pipeline.writing.commit import FinishedUnit
from pipeline.writing.encoding import Encoders
from pipeline.writing.finish import finish_unit
from pipeline.writing.restoring import outcome_of
from pipeline.writing.rows import OutputRow, encode_outcome

Turns = Callable[[Sequence[Asked]], Iterable[Sequence[Asked]]]
"""In which turns a unit's rows are edited."""


def all_at_once(rows: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    """In one turn: their rows share the network's calls."""
    yield rows


def edit_unit(
    unit_input: UnitInput,
    recipe: Recipe,
    engine: Engine,
    *,
    decoder: Decodes,
    encoders: Encoders,
    generation: int,
    rank: int = 0,
    turns: Turns = all_at_once,
    gates: Callable[[Edited], Edited] | None = None,
    on_result: Callable[[Decoded | Rejected], None] = lambda _: None,
) -> FinishedUnit:
    """Edit every row of a unit by everything that is asked of it: rows in, the unit's files and manifest out.

    Several units may be at work on one engine at once, from several threads. What a row gives depends on the row, the
    recipe and the call size alone: not on turns, neighbours or order.

    Args:
        unit_input: the unit and its rows, as read.
        recipe: the run.
        engine: a loaded model.
        decoder: of images and masks.
        encoders: threads that restore and encode.
        generation: of the driver, which the names of the unit's files bear.
        rank: of the unit among those at work on the engine: the lowest goes first, the others fill its calls up.
        turns: in which its rows are edited.
        gates: what a result meets before it is encoded; None: all are kept.
        on_result: told of each result as it leaves the engine.
    """

    def encode(result: Decoded | Rejected) -> OutputRow | Rejected:
        outcome = outcome_of(result, gates)
        return encode_outcome(outcome, recipe, engine.backbone.record, engine.call_size)

    def results(asked: Sequence[Asked]) -> Iterator[Decoded | Rejected]:
        kept.let_go_of_all_but(row.sample.index for row in asked)
        for rows in turns(asked):
            for result in edit_rows(rows, recipe, engine, decoder, rank=rank, kept=kept):
                spent.update(added(spent, spent_on(result)))
                on_result(result)
                yield result

    def make(asked: Sequence[Asked]) -> list[OutputRow | Rejected]:
        return encoders.map(encode, results(asked))

    spent: dict[str, Spent] = {}
    kept = KeptInversions(recipe)
    asked = [asked_of(row, recipe) for row in unit_input.rows]
    encoded = make(asked) if recipe.best_of is None else best_of(asked, recipe, make)
    return finish_unit(
        unit_input,
        encoded,
        recipe,
        generation=generation,
        model_digest=engine.backbone.record.digest,
        call_size=engine.call_size,
        spent=spent,
    )


def spent_on(result: Decoded | Rejected) -> dict[str, Spent]:
    """What servers took for a result, or for none, by its method; empty where none was asked."""
    if isinstance(result, Rejected):
        spent = result.error.spent if isinstance(result.error, AnswerError) else None
    else:
        spent = None if result.answer is None else result.answer.spent
    return {} if spent is None else {result.method: spent}


def edit_rows(
    rows: Iterable[Asked],
    recipe: Recipe,
    engine: Engine,
    decoder: Decodes,
    *,
    rank: int = 0,
    kept: KeptInversions | None = None,
) -> Iterator[Decoded | Rejected]:
    """Edit rows: every (image, edit, method) asked for comes back once, in whatever order, as `Decoded` or `Rejected`.

    A few rows are made ready ahead of the engine, so that it never waits for a decoder. Attempts share what is `kept`.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        ready = Ahead(rows, lambda asked: prepare_row(asked, recipe, engine.backbone, decoder))
        pool.submit(ready.fill)
        steps = (None if one is None else _edit_ready(one, recipe, engine.backbone, kept) for one in ready)
        try:
            for finished in engine.run(steps, rank=rank):
                if finished.error is not None:  # a fault of ours, not of a row: those become outcomes
                    raise finished.error
                yield from finished.value
                ready.let_go(finished.index)
        finally:
            ready.close()


def edit_row(asked: Asked, recipe: Recipe, backbone: Backbone, decoder: Decodes) -> Steps[list[Decoded | Rejected]]:
    """All edits of one row by all methods of the recipe."""
    return (yield from _edit_ready(prepare_row(asked, recipe, backbone, decoder), recipe, backbone))


def _edit_ready(
    ready: Prepared | list[Decoded | Rejected],
    recipe: Recipe,
    backbone: Backbone,
    kept: KeptInversions | None = None,
) -> Steps[list[Decoded | Rejected]]:
    if not isinstance(ready, Prepared):
        return ready
    setup = Setup(
        methods=recipe.methods_of(ready.attempt),
        run_seed=run_seed_of(recipe.run.seed, recipe.best_of, ready.attempt),
        round_trip=recipe.decodes_inputs,
        keeps_background=recipe.sink.background == "input",
        stored=stored_directions(recipe),
        libraries=libraries_of(recipe),
        bases=recipe.writes_bases,
        before=bounds_before(recipe),
        gain_seed=gain_seed_of(recipe),
        kept=kept,
    )
    return (yield from edit_prepared(ready, setup, backbone))


def bounds_before(recipe: Recipe) -> Bounds | None:
    """What a trajectory's own picture must be like for the edit to be made; None: it is not looked at."""
    return None if recipe.gates is None else recipe.gates.inversion_psnr


def prepare_row(
    asked: Asked, recipe: Recipe, backbone: Backbone, decoder: Decodes
) -> Prepared | list[Decoded | Rejected]:
    """Decode and fit one row; or everything that was asked of it, rejected."""
    if asked.refusal is not None:
        return [*asked.rejected(recipe.all_methods, asked.refusal)]
    try:
        size = recipe.model.size or backbone.image_size
        return prepare(asked, recipe, size=size, multiple=backbone.multiple, decoder=decoder)
    except ClusterError:  # no decoder can be started: no row is to blame
        raise
    except Exception as error:
        return [*asked.rejected(recipe.all_methods, refusal_by(error, "decode"))]
