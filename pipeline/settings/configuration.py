"""Configurations of commands other than `edit`: YAML and overrides in, a section or every problem out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.settings.explain import problems_in_words
from pipeline.settings.overrides import apply_overrides
from pipeline.settings.sections import Section
from pipeline.settings.yaml_file import UnusableFileError, read_yaml_file

C = TypeVar("C", bound=Section)


def read_config(path: str | Path, overrides: Sequence[str] = (), what: str = "configuration") -> Any:
    """Plain data of a YAML file under overrides such as `sink.folder=out`; values are YAML. `what`: it is, for errors.

    Raises:
        RecipeError: the file cannot be read, or an override leads nowhere.
    """
    where = str(path)
    try:
        data = read_yaml_file(path)
    except UnusableFileError as error:
        raise RecipeError(where, [(what, str(error))]) from None
    data = {} if data is None else data
    apply_overrides(data, overrides, where)
    return data


def config_from(kind: type[C], data: Any, where: str = "configuration", what: str = "configuration") -> C:
    """Build a configuration from plain data.

    Raises:
        RecipeError: lists every problem.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(where, [(what, f"should be a mapping, is {type(data).__name__}")])
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RecipeError(where, problems_in_words(error, kind)) from error
    except RecipeError as error:  # of a recipe that stands in it
        raise RecipeError(where, error.problems) from error


def load_config(kind: type[C], path: str | Path, overrides: Sequence[str] = (), what: str = "configuration") -> C:
    """Read a configuration.

    Raises:
        RecipeError: lists every problem.
    """
    return config_from(kind, read_config(path, overrides, what), str(path), what)
