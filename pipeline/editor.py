"""The plain-Python front door: load a model once, edit images. No Ray, no files.

from pipeline import Editor

editor = Editor.load("demo")
result = editor.edit("face.png", concepts=["sunglasses"])
result.image.save("edited.png")
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.engine.engine import Engine
from pipeline.errors import RowError
from pipeline.flow import edit_row, restored
from pipeline.models.backbone import Backbone
from pipeline.models.loading import load_backbone
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Concept, Edited, EditRequest, Rejected, Sample

COMPILED_CALL_SIZE = 8  # rows of a compiled UNet call, where nothing is said

AnyImage = str | Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One edit of one image."""

    edit: str
    method: str
    image: Image.Image  # edited, at the input's size
    mask: Image.Image  # mode "1", at the input's size: union of the concepts' masks
    masks: tuple[Image.Image, ...]  # mode "1", one per concept
    request: EditRequest
    seed: int
    figures: Mapping[str, float | None]  # evaluation/metrics.py

    @classmethod
    def of(cls, edited: Edited) -> Result:
        """The result of an outcome."""
        return cls(
            edit=edited.edit,
            method=edited.method,
            image=Image.fromarray(edited.image),
            mask=Image.fromarray(edited.mask),
            masks=tuple(Image.fromarray(mask) for mask in edited.masks),
            request=edited.request,
            seed=edited.seed,
            figures=edited.figures,
        )


class Editor:
    """A loaded model, ready to edit images one at a time.

    Its UNet calls are as small as one image needs, so that nothing is wasted; a job's are of one fixed size. Results
    agree to rounding; for the bits of a job, load with the job's call size.
    """

    def __init__(self, backbone: Backbone, *, call_size: int | None = None) -> None:
        self.backbone = backbone
        self.engine = Engine(backbone, call_size=call_size or 16, pad=call_size is not None)

    @classmethod
    def load(cls, model: str = "demo", *, call_size: int | None = None, **settings: Any) -> Editor:
        """Load a model.

        Args:
            model: "demo", a folder in diffusers format, or a hub id.
            call_size: rows of every UNet call; None for calls as small as what is asked, or, with `compile=True`,
                for calls of 8: every other size would be compiled anew.
            settings: more of the recipe's model section: revision, variant, dtype, compile.

        Raises:
            RecipeError: a setting is not one of the section's.
            ModelError: the checkpoint is missing, unsafe or of an unknown kind.
        """
        config = _recipe({"model": {"name": model, **settings}}).model
        return cls(load_backbone(config), call_size=call_size or (COMPILED_CALL_SIZE if config.compile else None))

    def edit(
        self,
        image: AnyImage,
        concepts: Sequence[str | Mapping[str, Any] | Concept] = (),
        *,
        target_prompt: str = "",
        negative_prompt: str = "",
        source_prompt: str = "",
        inversion: Mapping[str, Any] | None = None,
        editing: Mapping[str, Any] | None = None,
        mask: AnyImage | None = None,
        size: int | None = None,
        fit: Literal["crop", "pad", "stretch", "bucket"] = "pad",
        seed: int = 0,
        name: str | None = None,
        **more: Any,
    ) -> Result:
        """Edit one image by one method; LEDITS++ after edit-friendly inversion unless told otherwise.

        Args:
            image: path, encoded bytes, PIL image, or (H, W, 3) uint8.
            concepts: what to add or remove, as prompts or with settings (`Concept`).
            target_prompt, negative_prompt, source_prompt: for methods that think in prompts.
            inversion, editing: the recipe's sections of these names.
            mask: where the edit may act, white for everywhere; of the image's size.
            size, fit: model size in pixels, and how the image is brought to it.
            seed: of the run; the image's own seed derives from it and from `name`.
            name: the image's id; its content's hash where none is given.
            more: other fields of the edit request (`EditRequest`): blend_words, subtract_words, equalizer,
                cross_replace_steps.

        Raises:
            RecipeError: settings that cannot work; lists every problem.
            RowError: this image cannot be edited; a subclass names the stage.
        """
        request = {
            "concepts": [{"prompt": concept} if isinstance(concept, str) else _plain(concept) for concept in concepts],
            "target_prompt": target_prompt,
            "negative_prompt": negative_prompt,
            "source_prompt": source_prompt,
            **more,
        }
        settings: dict[str, Any] = {
            "edits": {"edit": request},
            "model": {"size": size, "fit": fit},
            "run": {"seed": seed},
        }
        if inversion is not None:
            settings["inversion"] = dict(inversion)
        if editing is not None:
            settings["editing"] = dict(editing)
        (result,) = self.edit_many(image, _recipe(settings), mask=mask, name=name)
        return result

    def edit_many(
        self, image: AnyImage, recipe: Recipe, *, mask: AnyImage | None = None, name: str | None = None
    ) -> list[Result]:
        """Every edit of a recipe by every method of it, from one inversion where the inversion's settings agree.

        The recipe's source, model name, sink and workers are not read.

        Raises:
            RowError: one of the results cannot be made.
        """
        data = _encoded(image)
        sample = Sample(
            id=name or hashlib.sha256(data).hexdigest()[:16],
            shard="",
            key=name or "image",
            index=0,
            image=data,
            mask=None if mask is None else _encoded(mask),
        )
        results = self.engine.run_one(edit_row(sample, recipe, self.backbone))
        order = {edit: place for place, edit in enumerate(recipe.edits)}
        for result in results:
            if isinstance(result, Rejected):
                raise _error_of(result)
        return [Result.of(restored(result)) for result in sorted(results, key=lambda result: order[result.edit])]


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    """A recipe around the given sections; source and sink are needed by its form and never read."""
    model = {key: value for key, value in settings.get("model", {}).items() if value is not None}
    return recipe_from({**settings, "model": model, "source": {"shards": "-"}, "sink": {"folder": "-"}}, "edit")


def _plain(concept: Mapping[str, Any] | Concept) -> Mapping[str, Any]:
    return concept.model_dump() if isinstance(concept, Concept) else concept


def _encoded(image: AnyImage) -> bytes:
    """Encoded bytes of whatever holds an image, without loss."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _error_of(outcome: Rejected) -> RowError:
    """The exception that an outcome records, of its stage's class."""
    for cls in RowError.__subclasses__():
        if cls.stage == outcome.stage:
            return cls(outcome.message)
    return RowError(f"{outcome.error_class}: {outcome.message}")


__all__ = ["Editor", "Result"]
