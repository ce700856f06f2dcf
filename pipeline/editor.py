"""The plain-Python front door: load a model once, edit images. No Ray, no files.

from pipeline import Editor

with Editor.load("demo") as editor:
    result = editor.edit("face.png", "sunglasses")
result.image.save("edited.png")
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import numpy as np
import torch

from pipeline.answering import servers_without_a_run
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.errors import RecipeError
from pipeline.interventions import Intervention
from pipeline.looking.counting import RowCounter
from pipeline.models.loading import checked_device, load_backbone
from pipeline.one_image import Setup, edit_prepared
from pipeline.reading.directions import refuse_other_directions, stored_directions
from pipeline.reading.libraries import libraries_of, refuse_other_autoencoders
from pipeline.reading.pictures import AnyImage, picture
from pipeline.reading.prepare import Pictures, prepare
from pipeline.reading.requests import requests_of
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Asked, Concept, Decoded, Prepared, Rejected, TextExpert, WordPair
from pipeline.result import Result
from pipeline.rewards import Reward
from pipeline.samples import Sample
from pipeline.writing.restoring import restored

COMPILED_CALL_SIZE = 8  # rows of a compiled network call, where nothing is said

OneConcept = str | Mapping[str, Any] | Concept
Concepts = OneConcept | Sequence[OneConcept]
Fit = Literal["crop", "pad", "stretch", "bucket"]
OnProgress = Callable[[int, int], None]


class EditSettings(TypedDict, total=False):
    """What `Editor.edit` takes beside the image, its mask and name, and the concepts."""

    target_prompt: str
    negative_prompt: str
    source_prompt: str
    inversion: Mapping[str, Any] | None
    editing: Mapping[str, Any] | None
    size: int | None
    fit: Fit
    seed: int
    blend_words: Mapping[str, Any] | WordPair
    subtract_words: Mapping[str, Any] | WordPair
    equalizer: Mapping[str, float]
    cross_replace_steps: Mapping[str, Any]
    interventions: Sequence[Mapping[str, Any] | Intervention]
    experts: Sequence[Mapping[str, Any] | TextExpert]
    rewards: Sequence[Mapping[str, Any] | Reward]


class Editor:
    """A loaded model, ready to edit images.

    Its network calls are as small as what is asked needs, so that nothing is wasted; a job's are of one fixed size.
    Results agree to rounding; for the bits of a job, load with the job's call size. `close` it, or use it in a `with`,
    to free the model's memory.
    """

    def __init__(self, backbone: Backbone, *, call_size: int | None = None) -> None:
        settings: dict[str, Any] = {"call_size": call_size or 16, "pad": call_size is not None}
        self._engine: Engine | None = Engine(backbone, **settings, asker=servers_without_a_run())

    @classmethod
    def load(
        cls,
        model: str = "demo",
        *,
        device: str | torch.device | None = None,
        call_size: int | None = None,
        **settings: Any,
    ) -> Editor:
        """Load a model.

        Args:
            model: "demo", the bundled model, which knows drawn faces only; a folder in diffusers format; a hub id; or
                "none", for methods that ask a server.
            device: "cpu", "cuda", "cuda:1", ...; None for the GPU where there is one.
            call_size: rows of every network call; None for calls as small as what is asked, or, with `compile=True`,
                for calls of 8: every other size would be compiled anew.
            settings: more of the recipe's model section: revision, variant, dtype, compile.

        Raises:
            RecipeError: a setting is not one of the section's.
            ModelError: the checkpoint is missing, unsafe or of an unknown kind, or there is no such device.
        """
        config = _recipe({"model": {"name": model, **settings}}).model
        backbone = load_backbone(config, device=None if device is None else checked_device(device, model))
        return cls(backbone, call_size=call_size or (COMPILED_CALL_SIZE if config.compile is True else None))

    @property
    def engine(self) -> Engine:
        """What runs the edits.

        Raises:
            RuntimeError: this editor is closed.
        """
        if self._engine is None:
            raise RuntimeError("this editor is closed. Load another")
        return self._engine

    @property
    def backbone(self) -> Backbone:
        """The loaded model."""
        return self.engine.backbone

    def close(self) -> None:
        """Let go of the model and its memory; results stay. A closed editor edits no more."""
        if self._engine is None:
            return
        on_gpu = self._engine.backbone.device.type == "cuda"
        self._engine = None
        gc.collect()  # networks hold themselves in circles
        if on_gpu:
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def edit(
        self,
        image: AnyImage,
        concepts: Concepts = (),
        *,
        target_prompt: str = "",
        negative_prompt: str = "",
        source_prompt: str = "",
        inversion: Mapping[str, Any] | None = None,
        editing: Mapping[str, Any] | None = None,
        mask: AnyImage | None = None,
        size: int | None = None,
        fit: Fit = "pad",
        seed: int = 0,
        name: str | None = None,
        on_progress: OnProgress | None = None,
        **more: Any,
    ) -> Result:
        """Edit one image by one method; LEDITS++ after edit-friendly inversion unless told otherwise.

        Args:
            image: path, encoded bytes, Pillow image of any mode, or array (`reading/pictures.py`). Turned upright by
                its EXIF orientation.
            concepts: what to add or remove: one or several, as prompts or with settings (`Concept`).
            target_prompt, negative_prompt, source_prompt: for methods that think in prompts.
            inversion, editing: the recipe's sections of these names.
            mask: where the edit may act: white, True, or 1 of the labels 0 and 1. Of the image's size or shape.
            size, fit: model size in pixels, and how the image is brought to it.
            seed: of the run; the image's own seed derives from it and from `name`.
            name: the image's id. Where none is given it derives from the pixels: the same picture as a file, an array
                or a Pillow image has the same seed.
            on_progress: called with (rows done, rows in all) after each network call. What may end early counts as if
                it did not, and the last call has all rows done.
            more: other fields of the edit request (`EditRequest`): blend_words, subtract_words, equalizer,
                cross_replace_steps, experts, rewards, interventions.

        Raises:
            RecipeError: settings that cannot work, or no edit is asked; lists every problem.
            RowError: this image cannot be edited; a subclass names the stage.
            OSError: the file cannot be read.
            Exception: what else went wrong inside, as it was raised.
        """
        settings: dict[str, Any] = {
            "target_prompt": target_prompt,
            "negative_prompt": negative_prompt,
            "source_prompt": source_prompt,
            "inversion": inversion,
            "editing": editing,
            "size": size,
            "fit": fit,
            "seed": seed,
        }
        recipe = _one_edit(concepts, **settings, **more)
        (result,) = self.edit_many(image, recipe, mask=mask, name=name, on_progress=on_progress)
        return result

    def edit_all(
        self,
        images: Iterable[AnyImage],
        concepts: Concepts = (),
        *,
        masks: Sequence[AnyImage | None] | None = None,
        names: Sequence[str] | None = None,
        on_progress: OnProgress | None = None,
        errors: Literal["return", "raise"] = "return",
        **settings: Unpack[EditSettings],
    ) -> list[Result | Exception]:
        """Make the same edit of many images, which share network calls: fewer than one after the other would make.

        Args:
            images: each as `edit` takes it.
            concepts: as of `edit`.
            masks: one per image; None for everywhere.
            names: one per image; see `edit`.
            on_progress: called with (images done, all images) after each image.
            errors: what an image that cannot be edited leads to. "return": its exception stands in its place in the
                list, and the others are edited. "raise": the first one ends everything.
            settings: what else `edit` takes.

        Returns:
            A result per image, in their order, or its exception.

        Raises:
            RecipeError: settings that cannot work, for any image.
            ValueError: not as many masks or names as images.
            Exception: with `errors="raise"`, what `edit` would raise.
        """
        recipe = _one_edit(concepts, **settings)
        given = list(images)
        for what, values in (("masks", masks), ("names", names)):
            if values is not None and len(values) != len(given):
                raise ValueError(f"{len(values)} {what} for {len(given)} images. Give one per image")
        edits = (
            self._edit(image, masks[at] if masks else None, names[at] if names else None, recipe)
            for at, image in enumerate(given)
        )
        results: dict[int, Result | Exception] = {}
        with closing(self.engine.run(edits)) as running:
            for finished in running:
                (outcome,) = finished.value if finished.error is None else (finished.error,)
                made = _result(outcome)
                if isinstance(made, Exception) and errors == "raise":
                    raise made
                results[finished.index] = made
                if on_progress is not None:
                    on_progress(len(results), len(given))
        return [results[at] for at in range(len(given))]

    def edit_many(
        self,
        image: AnyImage,
        recipe: Recipe,
        *,
        mask: AnyImage | None = None,
        name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Result]:
        """Every edit of a recipe by every method of it, from one inversion where the inversion's settings agree.

        The recipe's model name and workers are not read, nor its sink but for `background`, nor its source but for
        `max_pixels`. For the other arguments see `edit`.

        Returns:
            In the order of the recipe: its first edit by all its methods, then its second.

        Raises:
            RecipeError: the recipe has no edits.
            Exception: one of the results cannot be made: what `edit` would raise for the first such.
        """
        if not recipe.edits:
            raise RecipeError("recipe", [("edits", "no edit is asked. Say what to change")])
        total, on_rows = 0, None
        if on_progress is not None:
            counter = RowCounter(recipe, told_guidance=self.backbone.offers.embedded_guidance)
            total = counter.rows(recipe.edits, masked=mask is not None)
            on_rows = _reporting(on_progress, total)
        outcomes = self.engine.run_one(self._edit(image, mask, name, recipe), on_rows=on_rows)
        if on_progress is not None:
            on_progress(total, total)
        order = [(edit, method) for edit in recipe.edits for method in recipe.all_methods]
        results = []
        for outcome in sorted(outcomes, key=lambda outcome: order.index(_place(outcome))):
            made = _result(outcome)
            if isinstance(made, Exception):
                if len(order) > 1:
                    made.add_note(f"This was edit '{outcome.edit}' by method '{outcome.method}'.")
                raise made
            results.append(made)
        return results

    def _edit(
        self, image: AnyImage, mask: AnyImage | None, name: str | None, recipe: Recipe
    ) -> Steps[list[Decoded | Rejected]]:
        """All edits of an image; raises what keeps it from being read."""
        recipe.refuse_what_lacks(self.backbone.offers, self.backbone.record.name)
        prepared = self._prepared(image, mask, name, recipe)
        refuse_other_directions(recipe, self.backbone)
        refuse_other_autoencoders(recipe, self.backbone)
        setup = Setup(
            methods=recipe.all_methods,
            run_seed=recipe.run.seed,
            stored=stored_directions(recipe),
            libraries=libraries_of(recipe),
            round_trip=recipe.decodes_inputs,
            keeps_background=recipe.sink.background == "input",
        )
        return (yield from edit_prepared(prepared, setup, self.backbone))

    def _prepared(self, image: AnyImage, mask: AnyImage | None, name: str | None, recipe: Recipe) -> Prepared:
        sample = Sample(id=name or "", shard="", key=name or "image", index=0, image=b"")
        requests = requests_of(sample, recipe)
        prepared = prepare(
            Asked(sample=sample, edits=tuple(requests), requests=requests),
            recipe,
            size=recipe.model.size or self.backbone.image_size,
            multiple=self.backbone.multiple,
            pictures=Pictures(picture(image), None if mask is None else picture(mask, "mask")),
        )
        if name is not None:
            return prepared
        sample = dataclasses.replace(prepared.sample, id=_id_of(prepared.original))
        return dataclasses.replace(prepared, sample=sample)


def _reporting(on_progress: OnProgress, total: int) -> Callable[[int], None]:
    """Report rows that are done; the last ones once all results are there."""

    def told(rows: int) -> None:
        if rows < total:
            on_progress(rows, total)

    return told


def _id_of(pixels: np.ndarray) -> str:
    """The id of an image without a name: equal for equal pictures, however they are stored."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]


def _place(outcome: Decoded | Rejected) -> tuple[str, str]:
    return outcome.edit, outcome.method


def _result(outcome: Decoded | Rejected | Exception) -> Result | Exception:
    """What the user gets for an outcome."""
    if isinstance(outcome, Exception):
        return outcome
    if isinstance(outcome, Rejected):
        assert outcome.error is not None, "what is rejected here has just been raised"
        return outcome.error
    return Result.of(restored(outcome))


def _one_edit(
    concepts: Concepts,
    *,
    inversion: Mapping[str, Any] | None = None,
    editing: Mapping[str, Any] | None = None,
    size: int | None = None,
    fit: Fit = "pad",
    seed: int = 0,
    **request: Any,
) -> Recipe:
    """The recipe of `Editor.edit`."""
    sections: dict[str, Any] = {
        "edits": {"edit": {"concepts": [_concept(concept) for concept in _several(concepts)], **request}},
        "model": {"size": size, "fit": fit},
        "run": {"seed": seed},
    }
    if inversion is not None:
        sections["inversion"] = dict(inversion)
    if editing is not None:
        sections["editing"] = dict(editing)
    recipe = _recipe(sections)
    (edit,), (method,) = recipe.edits.values(), recipe.all_methods.values()
    # A data set may hold rows that ask for no change; whoever calls this for one image has forgotten something.
    if isinstance(method.editing, LEditsPP) and not edit.concepts:
        raise RecipeError("edit", [("concepts", "no edit is asked. Say what to add or to remove")])
    return recipe


def _several(concepts: Concepts) -> Sequence[OneConcept]:
    return (concepts,) if isinstance(concepts, (str, Mapping, Concept)) else concepts


def _concept(concept: OneConcept) -> Any:
    return {"prompt": concept} if isinstance(concept, str) else concept


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    """A recipe around the given sections; source and sink are needed by its form and never read."""
    model = {key: value for key, value in settings.get("model", {}).items() if value is not None}
    return recipe_from({**settings, "model": model, "source": {"shards": "-"}, "sink": {"folder": "-"}}, "edit")


__all__ = ["AnyImage", "Editor", "Result"]
