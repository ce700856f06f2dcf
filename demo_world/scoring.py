"""Scores of the demo model on fresh scenes: its autoencoder, its text to image, and edits judged by the drawn truth.

Every scene is drawn, edited by the engine that jobs use, and read back by the oracle. Since the edit's outcome can be
drawn, too, the pixels that should have changed are known. Cost: a second or two per edited scene on one core.
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch.nn.functional import max_pool2d

from demo_world.oracle import VALUES, read
from pipeline.editor import Editor
from pipeline.engine.calls import DecodeLatents, EncodeImage, Steps
from pipeline.evaluation.metrics import psnr
from pipeline.flow import edit_row
from pipeline.models.allocator import keep_freed_memory
from pipeline.models.demo.networks import IMAGE_SIZE, LATENT_SIZE, load_pipeline
from pipeline.models.demo.world import Attribute, Scene, changed_region, complete_caption, draw, edited
from pipeline.reading.prepare import HERE
from pipeline.reading.requests import asked_of
from pipeline.recipe import Recipe, load_recipe, recipe_from
from pipeline.records import Edited
from pipeline.samples import Sample
from pipeline.writing.restoring import outcome_of

Pixels = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditKind:
    """An edit whose outcome is known: on which scenes it makes sense, and what it should change."""

    before: Mapping[str, Any]  # attributes that a scene gets, so that there is something to do
    after: Mapping[str, Any]  # attributes that the edit shall change


# What is asked of the model for each kind stands in a recipe of that name, in configs/demo_edits.
SINGLE_EDITS: dict[str, EditKind] = {
    "add_sunglasses": EditKind(before={"sunglasses": False}, after={"sunglasses": True}),
    "add_hat": EditKind(before={"hat": None}, after={"hat": "red"}),
    "change_mouth": EditKind(before={"mouth": "smile"}, after={"mouth": "open"}),
    "remove_sunglasses": EditKind(before={"sunglasses": True}, after={"sunglasses": False}),
    "remove_hat": EditKind(before={"hat": "red"}, after={"hat": None}),
}
TRIPLE_EDIT = EditKind(
    before={"sunglasses": False, "hat": None, "mouth": "smile"},
    after={"sunglasses": True, "hat": "red", "mouth": "open"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditScore:
    """Shares and means over scenes."""

    success: float  # share of scenes in which all attributes that should change did
    unchanged: float  # share of the other attributes that stayed, over all scenes
    mask_iou: float  # of the combined mask with the true changed region, on the latents' grid
    background_psnr: float  # dB, outside the true changed region, against the autoencoder's round trip
    truth_psnr: float  # dB, inside it, against the round trip of the drawn edited scene


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should reach, and its unit."""

    at_least: float
    unit: str  # "dB", or "" for a share


TARGETS: dict[str, Target] = {
    "vae_psnr": Target(32, "dB"),
    "text_to_image": Target(0.97, ""),
    "reconstruction_psnr": Target(60, "dB"),
    "single_success": Target(0.95, ""),
    "single_unchanged": Target(0.95, ""),
    "triple_success": Target(0.80, ""),
    "mask_iou": Target(0.5, ""),
    "background_psnr": Target(30, "dB"),
    "truth_psnr": Target(21, "dB"),
    "oracle_accuracy": Target(0.99, ""),  # of the attribute that is read worst
}
OTHER_FIGURES = ("text_to_image", "reconstruction_psnr", "oracle", "vae_psnr")  # those that need no edit


def load_recipes(folder: Path) -> dict[str, Recipe]:
    """The recipe of each kind of edit, by its name, from a folder such as configs/demo_edits.

    Raises:
        RecipeError: one is missing or wrong.
    """
    return {name: load_recipe(folder / f"{name}.yaml") for name in (*SINGLE_EDITS, "triple")}


def _begin_process() -> None:
    """Set up a process of the pool: one thread; freed memory is kept."""
    torch.set_num_threads(1)
    keep_freed_memory()


def measure(
    folder: Path,
    recipes: Mapping[str, Recipe],
    count: int,
    seed: int = 1,
    workers: int = 1,
    tell: Callable[[str, Mapping[str, float]], None] | None = None,
) -> dict[str, float]:
    """All figures of `TARGETS` for the model in a folder, and those of each kind of edit, on `count` scenes each.

    Args:
        folder: of the model.
        recipes: see `load_recipes`.
        count: scenes per figure.
        seed: of the scenes; those of seed 1 were never used to choose a setting.
        workers: processes of one thread each that share the work; 1 does it in this process.
        tell: called with the name and the figures of each part of the work when it is done.
    """
    part = partial(measure_part, folder=folder, recipes=recipes, count=count, seed=seed)
    names = ["triple", *SINGLE_EDITS, *OTHER_FIGURES]  # the longest first
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        parts: Iterable[tuple[str, dict[str, float]]] = ((name, part(name)) for name in names)
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_process))
            futures = {pool.submit(part, name): name for name in names}
            parts = ((futures[future], future.result()) for future in as_completed(futures))
        for name, figures in parts:
            found[name] = figures
            if tell is not None:
                tell(name, figures)

    def mean(figure: str) -> float:
        return float(np.mean([found[name][figure] for name in SINGLE_EDITS]))

    summary = {
        **{name: found[name][name] for name in ("text_to_image", "reconstruction_psnr", "vae_psnr")},
        "oracle_accuracy": min(found["oracle"].values()),
        "single_success": mean("success"),
        "single_unchanged": mean("unchanged"),
        "triple_success": found["triple"]["success"],
        "mask_iou": mean("mask_iou"),
        "background_psnr": mean("background_psnr"),
        "truth_psnr": mean("truth_psnr"),
    }
    several = (*SINGLE_EDITS, "triple", "oracle")
    details = {f"{name}.{figure}": value for name in several for figure, value in found[name].items()}
    return {**{name: summary[name] for name in TARGETS}, **details}


def measure_part(name: str, *, folder: Path, recipes: Mapping[str, Recipe], count: int, seed: int) -> dict[str, float]:
    """One of `OTHER_FIGURES`, or the figures of an `EditScore` for one kind of edit."""
    scenes = fresh_scenes(count, seed)
    if name == "text_to_image":
        return {name: text_to_image(load_pipeline(folder), scenes)}
    editor = Editor.load(str(folder))
    if name == "vae_psnr":
        return {name: vae_psnr(editor, scenes)}
    if name == "oracle":
        return oracle_accuracy(editor, scenes)
    if name == "reconstruction_psnr":
        return {name: reconstruction_psnr(editor, scenes)}
    kind = TRIPLE_EDIT if name == "triple" else SINGLE_EDITS[name]
    return asdict(edit_score(editor, kind, recipes[name], scenes))


def table(scores: Mapping[str, float]) -> str:
    """The figures of `measure` as a Markdown table."""
    lines = ["| figure | measured | at least |", "|---|---|---|"]
    for name, value in scores.items():
        target = TARGETS.get(name)
        is_level = name.endswith("psnr")
        measured = f"{value:.1f} dB" if is_level else f"{value:.3f}"
        wanted = f"{target.at_least:g} {target.unit}".strip() if target else ""
        lines.append(f"| {name} | {measured} | {wanted} |")
    return "\n".join(lines) + "\n"


def fresh_scenes(count: int, seed: int = 1) -> list[Scene]:
    """Scenes that no training saw: training draws with generators of other seeds."""
    rng = np.random.default_rng([seed, 10_000])
    return [Scene.random(rng) for _ in range(count)]


def edit_score(editor: Editor, kind: EditKind, recipe: Recipe, scenes: Sequence[Scene]) -> EditScore:
    """Make one kind of edit on all scenes, and judge the outcome."""
    before = [edited(scene, **kind.before) for scene in scenes]
    after = [edited(scene, **kind.after) for scene in before]
    results = run_edits(editor, before, recipe)
    untouched = round_trips(editor, [draw(scene, IMAGE_SIZE) for scene in before])
    perfect = round_trips(editor, [draw(scene, IMAGE_SIZE) for scene in after])

    succeeded, stayed, ious, noises, likenesses = [], [], [], [], []
    for start, goal, result, reference, ideal in zip(before, after, results, untouched, perfect, strict=True):
        found, wanted = read(result.image), goal.attributes()
        succeeded.append(all(found[name] == wanted[name] for name in asked(kind)))
        stayed += [found[name] == wanted[name] for name in wanted if name not in asked(kind)]
        truth = changed_region(start, goal, IMAGE_SIZE)
        cell = IMAGE_SIZE // LATENT_SIZE
        region = np.zeros_like(truth) if result.mask is None else result.mask
        ious.append(mask_iou(region[::cell, ::cell], truth))
        noises.append(psnr(reference[~truth], result.image[~truth]) or 0.0)
        likenesses.append(psnr(ideal[truth], result.image[truth]) or 0.0)
    return EditScore(
        success=float(np.mean(succeeded)),
        unchanged=float(np.mean(stayed)),
        mask_iou=float(np.mean(ious)),
        background_psnr=float(np.mean(noises)),
        truth_psnr=float(np.mean(likenesses)),
    )


def asked(kind: EditKind) -> tuple[Attribute, ...]:
    """The attributes that an edit is to change."""
    return tuple(kind.after)  # type: ignore[arg-type]  # the keys are attributes


def run_edits(editor: Editor, scenes: Sequence[Scene], recipe: Recipe) -> list[Edited]:
    """Edit the drawings of all scenes by a recipe of one edit and one method, batched by the engine.

    Raises:
        RuntimeError: a scene could not be edited; the demo model must edit all of them.
    """
    samples = [
        Sample(id=f"scene-{index}", shard="", key=f"scene-{index}", index=index, image=png(draw(scene, IMAGE_SIZE)))
        for index, scene in enumerate(scenes)
    ]
    outcomes: dict[int, Edited] = {}
    for finished in editor.engine.run(
        edit_row(asked_of(sample, recipe), recipe, editor.backbone, HERE) for sample in samples
    ):
        if finished.error is not None:
            raise finished.error
        outcome = outcome_of(*finished.value)
        if not isinstance(outcome, Edited):
            raise RuntimeError(f"scene {finished.index} could not be edited: {outcome.message}")
        outcomes[finished.index] = outcome
    return [outcomes[index] for index in range(len(scenes))]


def round_trips(editor: Editor, images: Sequence[Pixels]) -> list[Pixels]:
    """Each image encoded and decoded: the most that an edit of latents can keep of it."""

    def there_and_back(pixels: Pixels) -> Steps[Pixels]:
        latents = yield EncodeImage(pixels)
        return (yield DecodeLatents(latents))

    decoded: dict[int, Pixels] = {}
    for finished in editor.engine.run(there_and_back(image) for image in images):
        if finished.error is not None:
            raise finished.error
        decoded[finished.index] = finished.value
    return [decoded[index] for index in range(len(images))]


def vae_psnr(editor: Editor, scenes: Sequence[Scene]) -> float:
    """Mean PSNR of the autoencoder's round trip, dB."""
    images = [draw(scene, IMAGE_SIZE) for scene in scenes]
    pairs = zip(images, round_trips(editor, images), strict=True)
    return float(np.mean([psnr(image, decoded) for image, decoded in pairs]))


def oracle_accuracy(editor: Editor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of the scenes in which the oracle reads each attribute right, drawn and after the autoencoder."""
    drawn = [draw(scene, IMAGE_SIZE) for scene in scenes]
    shares = {}
    for kind, images in {"drawn": drawn, "round_trip": round_trips(editor, drawn)}.items():
        readings = [read(image) for image in images]
        for name in VALUES:
            right = [found[name] == scene.attributes()[name] for found, scene in zip(readings, scenes, strict=True)]
            shares[f"{kind}.{name}"] = float(np.mean(right))
    return shares


def reconstruction_psnr(editor: Editor, scenes: Sequence[Scene]) -> float:
    """Mean PSNR of inversion and replay without an edit, against the autoencoder's round trip, dB (100 for equal)."""
    references = round_trips(editor, [draw(scene, IMAGE_SIZE) for scene in scenes])
    # A concept without weight asks for no row of its own: LEDITS++ replays the trajectory.
    unedited: dict[str, Any] = {"edit": {"concepts": [{"prompt": "nothing", "guidance_scale": 0.0}]}}
    recipe = recipe_from({"source": {"shards": "-"}, "edits": unedited, "sink": {"folder": "-"}}, "reconstruction")
    results = run_edits(editor, scenes, recipe)
    return float(np.mean([psnr(one, other.image) for one, other in zip(references, results, strict=True)]))


def text_to_image(
    pipeline: Any,
    scenes: Sequence[Scene],
    guidance_scale: float = 5.0,
    num_steps: int = 30,
    seed: int = 0,
) -> float:
    """Share of the attributes named in complete captions that the oracle finds in the images made of them.

    `pipeline` is a `StableDiffusionPipeline`, see `load_pipeline`.
    """
    right = []
    for start in range(0, len(scenes), 16):
        batch = scenes[start : start + 16]
        rng = np.random.default_rng([seed, start])
        images = pipeline(
            [complete_caption(scene, rng) for scene in batch],
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed + start + place) for place in range(len(batch))],
            output_type="np",
        ).images
        for scene, image in zip(batch, images, strict=True):
            found = read((image * 255).round().astype(np.uint8))
            # What a scene lacks is not in its caption, so it is not asked for.
            right += [found[name] == value for name, value in scene.attributes().items() if value]
    return float(np.mean(right))


def mask_iou(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Intersection over union on the latents' grid. Cells of the mask next to true ones are not held against it."""
    cell = truth.shape[0] // mask.shape[0]
    cells = truth.reshape(mask.shape[0], cell, mask.shape[1], cell).any(axis=(1, 3))
    near = max_pool2d(torch.from_numpy(cells)[None].float(), 3, stride=1, padding=1)[0].numpy() > 0
    beside = near & ~cells
    return float((mask & cells).sum() / max(1, (cells | (mask & ~beside)).sum()))


def png(pixels: Pixels) -> bytes:
    """Encoded without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
