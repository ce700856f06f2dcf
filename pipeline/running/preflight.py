"""What `edit`, and `plan` too, check before a run begins, without writing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from pipeline.common.partition import WHOLE, Partition
from pipeline.editing.problems import places_of, word_beyond
from pipeline.errors import RecipeError, SourceError
from pipeline.models.outline import Outline, outline_of
from pipeline.reading.rows import listed
from pipeline.reading.shards import ReadTask, Shard
from pipeline.reading.storage import open_fs
from pipeline.reading.units import read_units
from pipeline.recipe import Method, Recipe
from pipeline.records import EditRequest
from pipeline.running.todo import Todo, find_todo
from pipeline.samples import ReadRow, Sample
from pipeline.settings.remote import needless_model
from pipeline.settings.sections import SourceConfig
from pipeline.writing.lock import DriverLock
from pipeline.writing.sink_place import refuse_sink_over_source, refuse_unusable_sink

TASKS_LOOKED_AT = 4
ROWS_LOOKED_AT = 8  # of each shard
MOST_TEXT = 16_384  # bytes of a member that may be a caption
SIDECARS = ("txt", "caption", "text", "cap", "prompt")  # what captions beside images are called
SIDECARS_LOOKED_FOR = 3  # images
CAPTION_WORDS = ("caption", "text", "prompt", "description", "txt")


def refuse_what_the_model_lacks(recipe: Recipe) -> None:
    """See that the model has what methods and edits name, as far as its configuration is at hand.

    Raises:
        RecipeError: a layer that is to be controlled is missing; an inpainting checkpoint meets a method for a plain
            one, or the other way round; a word stands where the text encoder has stopped reading.
    """
    outline = outline_of(recipe.model)
    if outline.offers is not None:
        recipe.refuse_what_lacks(outline.offers, recipe.model.name)
    problems = needless_model(recipe)
    problems += [
        (f"edits.{edit}", f"{text} (method '{name}')" if recipe.methods else text)
        for edit, request in recipe.edits.items()
        for name, method in recipe.all_methods.items()
        for text in _cut_words(request, method, outline)
    ]
    if problems:
        raise RecipeError("recipe", problems)


def _cut_words(request: EditRequest, method: Method, outline: Outline) -> Iterator[str]:
    """Words that the prompts have, and lose where the text encoder stops reading."""
    whole = {name: getattr(request, name) for name in ("source_prompt", "target_prompt")}
    read = {name: outline.read_part(prompt) for name, prompt in whole.items()}
    missing = {problem.word for problem in method.editing.problems(request.model_copy(update=read), method.inversion)}
    for word in sorted(missing - {""}):
        for name, prompt in whole.items():
            if places_of(word, prompt) and not places_of(word, read[name]):
                yield word_beyond(word, "word", prompt)


def todo_of_plan(recipe: Recipe, partition: Partition = WHOLE) -> Todo:
    """What `edit` would find to do, or the error that would end it before it begins. Writes nothing.

    Raises:
        RecipeError: the model lacks what methods or edits name.
        SourceError: there is nothing to read.
        SinkError: the folder lies over the source, cannot be written, belongs to another run, or is being written.
    """
    refuse_what_the_model_lacks(recipe)
    refuse_sink_over_source(recipe)
    refuse_unusable_sink(recipe)
    DriverLock(recipe.sink, on_lost=lambda _: None, partition=partition).look()
    return find_todo(recipe, partition=partition)


def check_captions(rows: Iterable[ReadRow], shards: Sequence[Shard], recipe: Recipe) -> str:
    """See that `source.caption` names something that rows have.

    Args:
        rows: some of the source.
        shards: of the source; at least one.
        recipe: the run's.

    Returns:
        A line for the user where no row has text under that name, while all have some under others; else "".

    Raises:
        RecipeError: that is so, and the captions were to be the source prompts.
    """
    source = recipe.source
    samples = [row for row in rows if isinstance(row, Sample)]
    if not samples or any(sample.caption for sample in samples):
        return ""
    others = _text_names(samples, shards[0], source)
    is_meant = "caption" in source.model_fields_set or source.caption_is_source_prompt
    if not others or not (is_meant or any(word in name.lower() for name in others for word in CAPTION_WORDS)):
        return ""
    text = (
        f"no row has text under '{source.caption}' ({len(samples):,} looked at); rows have: {listed(others)}. Name the "
        "captions' member or column in source.caption"
    )
    if source.caption_is_source_prompt:
        raise RecipeError("recipe", [("source.caption", f"{text}, since the caption is to be the source prompt")])
    return f"source.caption: {text}"


def _text_names(samples: Sequence[Sample], shard: Shard, source: SourceConfig) -> list[str]:
    """What `source.caption` could name: members or columns that hold text, in the order in which they are met."""
    if shard.format == "folder":
        fs, root = open_fs(shard.url, source.storage_options)
        stems = {sample.key for sample in samples[:SIDECARS_LOOKED_FOR]}
        return [name for name in SIDECARS if any(fs.exists(f"{root}/{stem}.{name}") for stem in stems)]
    if shard.format == "parquet":
        named = (name for sample in samples for name, value in sample.columns.items() if isinstance(value, str))
    else:
        named = (name for sample in samples for name, content in sample.members.items() if _is_text(content))
    return list(dict.fromkeys(named))


def _is_text(content: bytes) -> bool:
    """Whether a member may be a caption: UTF-8 of a length that somebody may have written."""
    if not content.strip() or len(content) > MOST_TEXT:
        return False
    try:
        return "".join(content.decode("utf-8-sig").split()).isprintable()
    except UnicodeDecodeError:
        return False


def rows_to_look_at(tasks: Sequence[ReadTask], source: SourceConfig) -> list[ReadRow]:
    """The first rows of a few shards that are to be read: enough to see how a row is made up, and read in no time."""
    chosen = [tasks[at * len(tasks) // TASKS_LOOKED_AT] for at in range(min(TASKS_LOOKED_AT, len(tasks)))]
    rows: list[ReadRow] = []
    for task in dict.fromkeys(chosen):
        with contextlib.suppress(SourceError):  # the run itself will say so
            unit = next(read_units(task, source, ROWS_LOOKED_AT, lambda _: False), None)
            rows += unit.rows if unit else ()
    return rows
