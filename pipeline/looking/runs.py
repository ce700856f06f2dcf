"""A run's folder, named by itself or by the recipe that wrote to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.common.showing import public_url, typed
from pipeline.errors import RecipeError, SinkError
from pipeline.recipe import Recipe, SinkConfig, SourceConfig, load_recipe
from pipeline.writing.run_record import RunRecord, read_run_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that was started at some time."""

    sink: SinkConfig
    record: RunRecord
    source_options: Mapping[str, Any]  # to open the input; run.json holds none, for they may be secret
    # The input: the recipe's own. Of a folder alone what its run.json names, where that is a place on this machine;
    # else None, for a record may come from a stranger, and no address in it is opened unasked.
    source: SourceConfig | None
    by_recipe: bool  # the recipe was given
    where: str  # how to name the run on a command line, quoted
    config: str  # how to name its recipe there


def find_run(where: str, overrides: Sequence[str] = ()) -> Run:
    """A run by the place where it stands.

    Args:
        where: a run's folder, a path or URL; or its recipe, a file, which may carry storage options.
        overrides: of the recipe, as `load_recipe` takes them.

    Raises:
        RecipeError: the recipe does not describe a possible run, or a folder was given with overrides.
        SinkError: no run is there.
    """
    recipe: Recipe | None = None
    if os.path.isfile(where) or (where.endswith((".yaml", ".yml")) and "://" not in where and not os.path.isdir(where)):
        recipe = load_recipe(where, overrides)
        sink = recipe.sink
        named = config = typed(where, overrides)
    elif overrides:
        problem = f"changes a recipe, and {public_url(where)} is a run's folder. Give the recipe, or the folder alone"
        # The key alone: a value may be a secret.
        raise RecipeError(public_url(where), [(override.partition("=")[0], problem) for override in overrides])
    else:
        try:
            sink, named, config = SinkConfig(folder=where), typed(where, ()), "CONFIG"
        except ValidationError as error:
            raise SinkError(f"'{public_url(where)}' names no folder: {error.errors()[0]['msg']}") from error
    record = read_run_record(sink)
    if record is None:
        raise SinkError(
            f"{public_url(sink.folder)} holds no run: run.json is missing. Give the folder that `shardedit edit` wrote "
            "to (sink.folder), or its recipe"
        )
    return Run(
        sink=sink,
        record=record,
        source_options=recipe.source.storage_options if recipe else {},
        source=recipe.source if recipe else _local_source(record),
        by_recipe=recipe is not None,
        where=named,
        config=config,
    )


def _local_source(record: RunRecord) -> SourceConfig | None:
    """The source that run.json names by absolute paths of this machine; None for any other."""
    try:
        source = SourceConfig.model_validate(record.recipe["source"])
    except ValidationError:
        return None
    paths = [url.removeprefix("file://") for url in source.shards]
    return source if all(os.path.isabs(path) for path in paths) else None
