"""The whole check: load, look, measure, and write the page and the JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.common.showing import about_path, describe, printable
from pipeline.errors import ModelError, RecipeError, SinkError
from pipeline.looking.check_model import agreement, editing, model, round_trips
from pipeline.looking.check_model.page import render
from pipeline.looking.check_model.records import Check, ModelCheck
from pipeline.looking.check_model.subject import Subject, request_of
from pipeline.models.loading import checked_device, find_checkpoint, load_backbone
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe, recipe_with
from pipeline.records import EditRequest
from pipeline.settings.sections import ModelConfig
from pipeline.writing.files import put_over_ours

PROMPT = "add sunglasses"
NUM_STEPS = 20
PAGE, JSON = "check-model.html", "check-model.json"
MARK = b"shardedit check-model"  # in both
WHERE = "check-model"  # as errors name the command line
READ = ("model.", "run.seed=", "run.call_size=")  # beginnings of the overrides that are read

OnCheck = Callable[[Check], None]


def recipe_for(model: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a check: a model's name, and settings as on `edit`'s command line.

    Raises:
        RecipeError: settings that no model can have, or that a check does not read.
    """
    if others := [override.partition("=")[0] for override in overrides if not override.startswith(READ)]:
        problem = "is not read here. Give model.*, run.seed or run.call_size"
        raise RecipeError(WHERE, [(other, problem) for other in others])
    return _recipe({"model": {"name": model}}, overrides)


def _recipe(sections: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe around sections; source and sink are needed by its form and never read."""
    return recipe_with({**sections, "source": {"shards": "-"}, "sink": {"folder": "-"}}, overrides, WHERE)


def check_model(
    config: ModelConfig,
    image: bytes | None,
    folder: Path,
    *,
    prompt: str = PROMPT,
    num_steps: int = NUM_STEPS,
    seed: int = 0,
    call_size: int | Literal["auto"] = "auto",
    device: str | None = None,
    on_check: OnCheck = lambda _: None,
) -> ModelCheck:
    """Check a model, and write `check-model.html` and `check-model.json`. A model that is refused is a finding.

    Args:
        config: the recipe's model section.
        image: a photograph, encoded; None: a face is drawn.
        folder: where both files go; made where it is missing.
        prompt: what to add or to remove: "a hat", "add a hat", "remove the hat".
        num_steps: of inversions and edit.
        seed: of the run whose edit this is.
        call_size: rows of the network calls that are timed; auto: as a run has them.
        device: None: the GPU where there is one.
        on_check: told of each answer as it comes.

    Raises:
        RecipeError: the prompt asks for nothing.
        ModelError: there is no such device.
        DecodeError: the image cannot be opened.
        SinkError: the folder cannot be written, or holds a file of that name that is not ours.
    """
    chosen = None if device is None else checked_device(device, config.name)
    recipe = _recipe({"model": config, "run": {"seed": seed, "call_size": call_size}})
    request = request_of(prompt)
    _make(folder)
    begun = time.perf_counter()
    checks: list[Check] = []
    for check in _answers(recipe, image, request, num_steps, chosen):
        checks.append(check)
        on_check(check)
    given = "a drawn face, as no image was given" if image is None else "the image that was given"
    found = ModelCheck(
        model=config.name,
        image=given,
        checks=tuple(checks),
        seconds=time.perf_counter() - begun,
        page=folder / PAGE,
        json=folder / JSON,
    )
    fs, root = open_fs(str(folder), {})
    for name, text in ((PAGE, render(found)), (JSON, json.dumps(found.as_dict(), indent=1) + "\n")):
        put_over_ours(fs, f"{root}/{name}", text.encode("utf-8", "backslashreplace"), MARK)
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SinkError(
            f"{folder} cannot be written: {about_path(error) or describe(error)}. Give another --out"
        ) from error


def _answers(
    recipe: Recipe, image: bytes | None, request: EditRequest, num_steps: int, device: torch.device | None
) -> Iterator[Check]:
    start = time.perf_counter()
    try:
        checkpoint = None if recipe.model.name == "analytic" else find_checkpoint(recipe.model)[:2]
        backbone = load_backbone(recipe.model, device=device)
        yield model.loaded(backbone, checkpoint, time.perf_counter() - start)
    except ModelError as error:
        yield Check(name="loads", status="failed", text=str(error))
        return
    subject = Subject.of(recipe, backbone, checkpoint, image=image, request=request, num_steps=num_steps)
    made: dict[str, Check] = {}
    for name, look in (
        ("offers", model.offers),
        ("methods", model.methods),
        ("autoencoder", round_trips.autoencoder),
        ("inversions", round_trips.inversions),
        ("agreement", agreement.agreement),
        ("edit", editing.edit),
    ):
        made[name] = guarded(name, partial(look, subject))
        yield made[name]
    rows = made["edit"].values.get("network_rows")
    there, back = (made["autoencoder"].values.get(key) for key in ("encode_seconds", "decode_seconds"))
    beside = None if there is None or back is None else there + 2 * back
    yield guarded("speed", lambda: editing.speed(subject, rows, beside))


def guarded(name: str, look: Callable[[], Check]) -> Check:
    """An answer, or the error that there is none: one question that cannot be answered does not end the others."""
    try:
        return look()
    except Exception as error:
        text = printable(describe(error)).rstrip(".")
        return Check(name=name, status="failed", text=f"{text}. The other answers may say why.")


__all__ = ["check_model", "recipe_for"]
