"""A run's folder, named by itself or by the recipe that wrote to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import SinkError
from pipeline.recipe import SinkConfig, load_recipe
from pipeline.showing import public_url
from pipeline.writing.run_record import RunRecord, read_run_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that was started at some time."""

    sink: SinkConfig
    record: RunRecord
    source_options: Mapping[str, Any]  # to open the input; run.json holds none, for they may be secret
    config: str  # how to name its recipe on a command line


def find_run(where: str) -> Run:
    """A run by the place where it stands.

    Args:
        where: a run's folder, a path or URL; or its recipe, a YAML file, which may carry storage options.

    Raises:
        RecipeError: the recipe does not describe a possible run.
        SinkError: no run is there.
    """
    recipe = load_recipe(where) if where.endswith((".yaml", ".yml")) and Path(where).is_file() else None
    sink = recipe.sink if recipe else SinkConfig(folder=where)
    record = read_run_record(sink)
    if record is None:
        raise SinkError(
            f"{public_url(sink.folder)} holds no run: run.json is missing. Give the folder that `shardedit edit` wrote "
            "to (sink.folder), or its recipe"
        )
    options = recipe.source.storage_options if recipe else {}
    return Run(sink=sink, record=record, source_options=options, config=where if recipe else "CONFIG")
