"""Kinds of jobs that are measured: what is asked of each image, and by which method."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.against_diffusers import CONCEPTS
from pipeline.editing import EDITORS
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Steps
from pipeline.errors import RecipeError
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import draw_from
from pipeline.recipe import Method, Recipe, recipe_from
from pipeline.records import DrawNoise, EditedLatents, EditRequest, Source

STEPS = 50
PROMPTS = {"source_prompt": "a cat on a mat", "target_prompt": "a dog on a mat"}
WORDS: dict[str, Any] = {  # in which every editor finds its own
    **PROMPTS,
    "blend_words": {"source": ["cat"], "target": ["dog"]},
    "concepts": CONCEPTS[:1],
    "subject": {"words": ["mat"], "anchor_prompts": ["a mat"]},
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kind."""

    name: str
    images: int
    edits: Mapping[str, Mapping[str, Any]]
    inversion: Mapping[str, Any]
    editing: Mapping[str, Any]

    def recipe(self, **sections: Mapping[str, Any]) -> Recipe:
        """Of this job; other sections as they are given."""
        return recipe_from(
            {
                "source": {"shards": "-"},
                "edits": self.edits,
                "inversion": self.inversion,
                "editing": self.editing,
                "sink": {"folder": "-"},
                **sections,
            }
        )

    def smaller(self, *, steps: int, images: int | None = None) -> Job:
        """The same of fewer steps; everything acts from the first one on, but warm-ups, which end before the last."""

        def shortened(concept: Mapping[str, Any]) -> dict[str, Any]:
            return {**concept, "warmup_steps": min(concept.get("warmup_steps", 0), steps - 1)}

        edits = {
            name: {**edit, "concepts": [shortened(one) for one in edit.get("concepts", ())]}
            for name, edit in self.edits.items()
        }
        inversion = {**self.inversion, "num_steps": steps}
        begins = "start_step" in EDITORS[self.editing["method"]].model_fields
        editing = {**self.editing, "start_step": 0} if begins else self.editing
        return replace(self, edits=edits, inversion=inversion, editing=editing, images=images or self.images)


def from_latents(job: Job, backbone: Backbone, images: int, size: tuple[int, int]) -> Iterator[Steps[EditedLatents]]:
    """Every edit of so many images of random latents (h, w): an inversion and an edit, without the autoencoder."""
    recipe = job.recipe()
    for number in range(images):
        shape = (backbone.latent_channels, *size)
        for request in recipe.edits.values():
            for method in recipe.all_methods.values():
                prompt, negative_prompt = method.editing.inverts_under(request)
                source = Source(
                    latents=torch.randn(shape, generator=torch.Generator().manual_seed(number)),
                    prompt=prompt,
                    negative_prompt=negative_prompt,
                    schedule=backbone.schedule,
                    draw_noise=draw_from(number, shape),
                    editing_noise=partial(draw_from, number, shape),
                    draws=partial(_draws, number, shape),
                )
                yield _edit(source, request, method)


def _draws(number: int, shape: tuple[int, ...], purpose: str) -> DrawNoise:
    return draw_from(number + zlib.crc32(purpose.encode()), shape)


def _edit(source: Source, request: EditRequest, method: Method) -> Steps[EditedLatents]:
    trajectory = yield from method.inversion.invert(source)
    return (yield from method.editing.edit(trajectory, request))


def _job(name: str, images: int, edit: Mapping[str, Any], inversion: str, editor: str, **settings: Any) -> Job:
    return Job(
        name=name,
        images=images,
        edits={"edit": edit},
        inversion={"method": inversion, "num_steps": STEPS},
        editing={"method": editor, **settings},
    )


LEDITS = _job("LEDITS++, three concepts", 64, {"concepts": CONCEPTS}, "ddpm", "ledits_pp")
PROMPT_TO_PROMPT = _job("Prompt-to-Prompt, LocalBlend", 64, WORDS, "direct", "prompt_to_prompt")
MASACTRL = _job("MasaCtrl", 64, PROMPTS, "direct", "masactrl")
MASACTRL_AUTO = _job("MasaCtrl, automatic masks", 32, WORDS, "direct", "masactrl", mask="auto")
INVERSION = _job("edit-friendly inversion alone", 64, {}, "ddpm", "ledits_pp")  # no concept: nothing is walked
MAIN = (LEDITS, PROMPT_TO_PROMPT, MASACTRL, INVERSION)

# Two edits, whose concepts begin to act one after the other, so that an image has now one row, now four.
MIXED = Job(
    name="a run of warm-ups, two edits, three shapes",
    images=256,
    edits={
        name: {"concepts": [{**one, "warmup_steps": at * (number + 1)} for number, one in enumerate(CONCEPTS)]}
        for name, at in (("early", 5), ("late", 12))
    },
    inversion={"method": "ddpm", "num_steps": STEPS},
    editing={"method": "ledits_pp"},
)


def others(images: int = 16) -> list[Job]:
    """A job for every editor and every inversion that no job above has; of those that `WORDS` are enough for."""
    made: list[Job] = []
    seen = {part["method"] for job in (*MAIN, MASACTRL_AUTO) for part in (job.inversion, job.editing)}
    pairs = [(inversion, editor) for editor in EDITORS for inversion in INVERSIONS]
    for inversion, editor in sorted(pairs, key=lambda pair: pair[0] == "null_text"):  # which takes long: only once
        job = _job(f"{inversion} + {editor}", images, WORDS, inversion, editor)
        if {inversion, editor} <= seen or not _is_possible(job):
            continue
        seen |= {inversion, editor}
        made.append(job)
    return made


def _is_possible(job: Job) -> bool:
    try:
        job.recipe()
    except RecipeError:
        return False
    return True
