"""The model and the picture that are checked, and how an edit is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError

from pipeline.engine.backbone import Backbone
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, RecipeError
from pipeline.looking.check_model.drawn import drawn_face
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.base import Family
from pipeline.models.loading import BUNDLED
from pipeline.one_image import Setup, edit_prepared
from pipeline.reading.prepare import prepare
from pipeline.recipe import Method, Recipe
from pipeline.records import Asked, Concept, Decoded, EditRequest, Prepared
from pipeline.samples import Sample

DIRECTIONS: dict[str, Literal["add", "remove"]] = {"add": "add", "remove": "remove"}
EDIT = "check"  # name of the edit
ENGINE_ROWS = 16  # most rows of a call; calls are as small as what is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the checks look at."""

    backbone: Backbone
    engine: Engine
    recipe: Recipe
    prepared: Prepared  # the picture at model size
    request: EditRequest
    num_steps: int
    checkpoint: tuple[Family, Checkpoint] | None  # None: the closed-form model has none

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        backbone: Backbone,
        checkpoint: tuple[Family, Checkpoint] | None,
        *,
        image: bytes | None,
        request: EditRequest,
        num_steps: int,
    ) -> Subject:
        """A loaded model, and the picture at its size; a drawn one where `image` is None.

        Raises:
            DecodeError: the image cannot be opened.
        """
        side = recipe.model.size or backbone.image_size
        picture = image or drawn_face(side, grain=recipe.model.name not in BUNDLED)
        sample = Sample(id="check-model", shard="", key="check-model", index=0, image=picture)
        asked = Asked(sample=sample, edits=())
        return cls(
            backbone=backbone,
            engine=Engine(backbone, call_size=ENGINE_ROWS, pad=False),
            recipe=recipe,
            prepared=prepare(asked, recipe, size=side, multiple=backbone.multiple),
            request=request,
            num_steps=num_steps,
            checkpoint=checkpoint,
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the picture's latents."""
        height, width = self.prepared.placement.canvas
        return height // self.backbone.latent_scale, width // self.backbone.latent_scale

    def shown(self, pixels: np.ndarray) -> np.ndarray:
        """The part of a canvas (H, W, 3) that shows the picture: decibels are taken over it, without the padding."""
        rows, columns = self.prepared.placement.image_part((pixels.shape[0], pixels.shape[1]))
        return pixels[rows, columns]

    def edited(self, methods: Mapping[str, Method], request: EditRequest) -> tuple[dict[str, Decoded], int]:
        """The picture by every method, by its name, and the network rows that all took.

        Raises:
            EditError: one of them could not be made; says which and why.
        """
        prepared = replace(self.prepared, requests={EDIT: request})
        steps = edit_prepared(prepared, Setup(methods=methods, run_seed=self.recipe.run.seed), self.backbone)
        (finished,) = self.engine.run([steps])
        if finished.error is not None:
            raise finished.error
        made = {}
        for outcome in finished.value:
            if not isinstance(outcome, Decoded):
                raise EditError(f"{outcome.method}: {outcome.error_class}: {outcome.message}")
            made[outcome.method] = outcome
        return made, finished.network_rows


def request_of(prompt: str) -> EditRequest:
    """ "add a hat", "remove the hat" or "a hat": as a concept, and as a target prompt for methods that take none.

    Raises:
        RecipeError: nothing is named, or too much.
    """
    verb, _, rest = prompt.strip().partition(" ")
    what = rest if verb.lower() in DIRECTIONS else prompt
    try:
        concept = Concept(prompt=what, direction=DIRECTIONS.get(verb.lower(), "add"))
        return EditRequest(concepts=(concept,), target_prompt=what)
    except ValidationError as error:
        problem = "names nothing, or is too long. Say what to add or to remove: 'add a hat'"
        raise RecipeError("check-model", [("prompt", problem)]) from error


def waited_for(backbone: Backbone) -> None:
    """Come back when the device has done all that it was asked for: a clock stopped before measures nothing."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
