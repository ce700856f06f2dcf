"""Whole LEDITS++ edits by the engine and by diffusers' own pipelines, on the same shapes, images, steps and concepts.

diffusers edits a batch under one set of concepts, so images that have concepts of their own go through it one by one;
several edits of an image are several inversions. Its time for one edit is measured per number of concepts and batch,
and several edits take that many times as long.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    LEditsPPPipelineStableDiffusionXL,
)
from transformers import CLIPTokenizer

from benchmarks.against_diffusers import (
    CONCEPTS,
    edit_with_diffusers,
    edit_with_engine,
    photographs,
    prepared,
    recipe_for,
    rows,
)
from benchmarks.architectures import Architecture
from benchmarks.jobs import LEDITS
from pipeline.engine.engine import Engine
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.records import EditRequest, Prepared
from pipeline.running.worker import fit

if TYPE_CHECKING:
    from benchmarks.gpu import Scale

CONCEPT_COUNTS = (1, 2, 3)
EDIT_COUNTS = (1, 4)
WORTH_IT = 1.03  # a batch twice as large that gains less than that is the last one tried


def diffusers_pipeline(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> Any:
    """With SDE DPM-Solver++, as its documentation recommends; on networks of its own, which nobody has opened."""
    folder = architecture.folder
    scheduler = DPMSolverMultistepScheduler.from_pretrained(
        folder, subfolder="scheduler", algorithm_type="sde-dpmsolver++", solver_order=2
    )
    unet, vae = architecture.make_unet(device, dtype), architecture.make_vae(device, dtype)
    encoder, *second = architecture.make_texts(device, dtype)
    given: dict[str, Any] = {
        "vae": torch.nn.Module.to(vae, dtype),
        "text_encoder": encoder,
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": unet,
        "scheduler": scheduler,
    }
    if second:
        given |= {
            "text_encoder_2": second[0],
            "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            "add_watermarker": False,
        }
        pipe = LEditsPPPipelineStableDiffusionXL(**given)
    else:
        pipe = LEditsPPPipelineStableDiffusion(
            **given, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seconds_by_batch(
    scale: Scale, architecture: Architecture, pipe: Any, concepts: list[dict[str, Any]]
) -> dict[int, float]:
    """Of diffusers: seconds per image of one edit, by images of a batch, up to where more gain little or do not fit."""
    found: dict[int, float] = {}
    for batch in scale.batches:
        images = photographs(batch, architecture.image_size)
        try:
            if not found:
                edit_with_diffusers(pipe, images, 2, [concepts])  # not counted: kernels, caches
            started = time.perf_counter()
            edit_with_diffusers(pipe, images, scale.steps, [concepts], batch=batch)
        except RuntimeError:  # out of memory; and the pipeline of XL takes no batches of several images
            if batch == 1:
                raise
            torch.cuda.empty_cache()
            break
        before = min(found.values(), default=float("inf"))
        found[batch] = (time.perf_counter() - started) / batch
        if found[batch] * WORTH_IT > before:
            break
    return found


def compare(scale: Scale, architecture: Architecture) -> Iterator[dict[str, Any]]:
    """One model's rows of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers_pipeline(architecture, scale.device, scale.dtype)
        theirs = {count: seconds_by_batch(scale, architecture, pipe, CONCEPTS[:count]) for count in CONCEPT_COUNTS}
    del pipe
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
    model, size = tuned_model(scale, architecture)
    engine = Engine(model, call_size=size)
    for count in CONCEPT_COUNTS:
        for edits in EDIT_COUNTS:
            for shared in (True, False):
                batches = theirs[count] if shared else {1: theirs[count][1]}
                batch = min(batches, key=lambda one: batches[one])
                ours = engine_seconds(scale, architecture, engine, requests(count, edits), shared=shared)
                reference, lossless = rows(scale.steps, requests(count, edits))
                yield {
                    "model": architecture.name,
                    "concepts": count,
                    "edits": edits,
                    "of": "all images" if shared else "each image",
                    "engine_images_per_s": round(1 / ours, 3),
                    "diffusers_images_per_s": round(1 / (edits * batches[batch]), 3),
                    "diffusers_batch": batch,
                    "ratio": round(edits * batches[batch] / ours, 2),
                    "row_ratio": round(reference / lossless, 2),
                }


def tuned_model(scale: Scale, architecture: Architecture) -> tuple[StableDiffusion, int]:
    """The product's model as a run would run it, and the rows of a call."""
    model = architecture.model(scale.device, scale.dtype)
    recipe = LEDITS.recipe(
        model={"size": architecture.image_size, "compile": "auto" if scale.compiled else False},
        run={"call_size": scale.call_size or "auto"},
    )
    return model, fit(recipe, model).call_size


def requests(concepts: int, edits: int) -> list[list[dict[str, Any]]]:
    """Concepts of each edit, which differ in strength."""
    return [
        [{**one, "guidance_scale": one["guidance_scale"] + extra} for one in CONCEPTS[:concepts]]
        for extra in range(edits)
    ]


def engine_seconds(
    scale: Scale, architecture: Architecture, engine: Engine, edits: list[list[dict[str, Any]]], *, shared: bool
) -> float:
    """Of the engine: seconds per image."""
    recipe = recipe_for(architecture.image_size, scale.steps, edits)
    inputs = prepared(photographs(scale.images, architecture.image_size), recipe, architecture.image_size)
    if not shared:
        inputs = [with_own_words(one, number) for number, one in enumerate(inputs)]
    edit_with_engine(engine, inputs[:1], recipe)  # not counted: kernels, caches, the compiler
    started = time.perf_counter()
    edit_with_engine(engine, inputs, recipe)
    return (time.perf_counter() - started) / len(inputs)


def with_own_words(one: Prepared, number: int) -> Prepared:
    """The same requests with prompts of its own."""

    def own(request: EditRequest) -> EditRequest:
        concepts = [concept.model_copy(update={"prompt": f"{concept.prompt} {number}"}) for concept in request.concepts]
        return request.model_copy(update={"concepts": tuple(concepts)})

    return replace(one, requests={name: own(request) for name, request in one.requests.items()})
