"""The model and the picture that are checked, and how an edit is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.engine.backbone import Backbone
from pipeline.engine.engine import Engine
from pipeline.errors import EditError
from pipeline.flow import edit_prepared
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.base import Family
from pipeline.reading.prepare import prepare
from pipeline.recipe import Method, Recipe
from pipeline.records import Asked, Concept, Decoded, EditRequest, Prepared, Sample

REMOVE, ADD = "remove ", "add "
EDIT = "check"  # name of the edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the checks look at."""

    backbone: Backbone
    engine: Engine
    recipe: Recipe
    prepared: Prepared  # the picture at model size
    request: EditRequest
    num_steps: int
    seed: int
    checkpoint: tuple[Family, Checkpoint] | None  # None: the closed-form model has none

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
        steps = edit_prepared(prepared, dict(methods), self.seed, self.backbone)
        (finished,) = self.engine.run([steps])
        if finished.error is not None:
            raise finished.error
        made = {}
        for outcome in finished.value:
            if not isinstance(outcome, Decoded):
                raise EditError(f"{outcome.method}: {outcome.error_class}: {outcome.message}")
            made[outcome.method] = outcome
        return made, finished.network_rows


def prepared_picture(image: bytes, recipe: Recipe, backbone: Backbone) -> Prepared:
    """The picture at model size.

    Raises:
        DecodeError: it is no image that may be opened.
    """
    sample = Sample(id="check-model", shard="", key="check-model", index=0, image=image)
    return prepare(
        Asked(sample=sample, edits=()),
        recipe,
        size=recipe.model.size or backbone.image_size,
        multiple=backbone.multiple,
    )


def request_of(prompt: str) -> EditRequest:
    """ "add a hat", "remove the hat" or "a hat": as a concept, and as a target prompt for methods that take none."""
    text = prompt.strip()
    removes = text.lower().startswith(REMOVE)
    bare = text[len(REMOVE) :] if removes else text[len(ADD) :] if text.lower().startswith(ADD) else text
    concept = Concept(prompt=bare, direction="remove" if removes else "add")
    return EditRequest(concepts=(concept,), target_prompt=bare)


def waited_for(backbone: Backbone) -> None:
    """Come back when the device has done all that it was asked for: a clock stopped before measures nothing."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
