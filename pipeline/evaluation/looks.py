"""What looks at a job's results through a model, for its gates: CLIP, DINOv2, a safety checker of one's own.

Each result is looked at alone, so that its figures, like its pixels, depend on nothing beside it. Nothing is loaded
that the recipe does not name. Cost: two pictures through the model per result.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

from PIL import Image
from typing_extensions import override

from pipeline.common.showing import describe
from pipeline.errors import EncodeError, RecipeError
from pipeline.evaluation.metric_models import clip_figures
from pipeline.gating.gate import LOOKED, Gates, Look
from pipeline.models.image_text import ImageTextModel, load_image_text
from pipeline.models.self_similarity import VisionTransformer, load_vision_transformer
from pipeline.recipe import Recipe
from pipeline.records import Edited

Checker = Callable[[list[Image.Image]], Sequence[float]]


def gates_of(recipe: Recipe) -> Gates | None:
    """The gates of a run, their models loaded; None where it has none.

    Raises:
        ModelError: a model cannot be loaded.
        RecipeError: the safety checker cannot be had.
    """
    config = recipe.gates
    if config is None:
        return None
    looks: list[Look] = []
    if config.clip is not None:
        looks.append(ClipLook(load_image_text(config.clip)))
    if config.dinov2 is not None:
        looks.append(ContentLook(load_vision_transformer(config.dinov2)))
    if config.safety is not None:
        looks.append(SafetyLook(config.safety))
    return Gates(config, looks)


class ClipLook(Look):
    """InstructPix2Pix's cosines (arXiv 2211.09800, section 3.1.2), by a CLIP with its checkpoint's own resizing."""

    columns = LOOKED["clip"]

    def __init__(self, model: ImageTextModel) -> None:
        self._model, self._lock = model, Lock()  # one at a time: it keeps texts, and the device is the editor's, too

    @override
    def __call__(self, edited: Edited) -> Mapping[str, float | None]:
        with self._lock:
            before, after = self._model.of_images([edited.original, edited.image])
            found = clip_figures(self._model, edited.request, before, after, None)
        return {name: found[name] for name in self.columns}


class ContentLook(Look):
    """DINOv2's similarity of the two images, whatever the prompts say."""

    columns = LOOKED["dinov2"]

    def __init__(self, model: VisionTransformer) -> None:
        self._model, self._lock = model, Lock()

    @override
    def __call__(self, edited: Edited) -> Mapping[str, float | None]:
        with self._lock:
            before, after = self._model.contents([edited.original, edited.image])
        return {"dinov2_sim": float(before @ after)}


class SafetyLook(Look):
    """A checker of the user's.

    Args:
        name: "package.module:factory".

    Raises:
        RecipeError: it cannot be had.
    """

    columns = LOOKED["safety"]

    def __init__(self, name: str) -> None:
        module, _, factory = name.partition(":")
        try:
            self._check: Checker = getattr(importlib.import_module(module), factory)()
        except Exception as error:  # a stranger's code
            text = f"{name} gives no checker: {describe(error)}. Give package.module:factory of one that is installed"
            raise RecipeError("recipe", [("gates.safety", text)]) from error
        self._name, self._lock = name, Lock()

    @override
    def __call__(self, edited: Edited) -> Mapping[str, float | None]:
        with self._lock:
            scores = list(self._check([Image.fromarray(edited.image)]))
        if len(scores) != 1 or not math.isfinite(scores[0]) or not 0 <= scores[0] <= 1:
            raise EncodeError(f"gates.safety: {self._name} gave {scores!r} for one picture, not one number from 0 to 1")
        return {"nsfw_score": float(scores[0])}
