"""The engine against the maintained LEDITS++ pipeline of diffusers: same model, images, steps and concepts.

Ratios of whole edits (encode, invert, edit, decode), measured in turns, each side in a process of its own, as users
run them: what the product tells its process's allocator must not help the other side. Two models: the random tiny
Stable Diffusion, whose calls cost mostly overhead, and a wide UNet that keeps this machine's cores busy, where only
saved rows can make a difference.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from pipeline.engine.backbone import ModelRecord
from pipeline.engine.engine import Engine, EngineStats
from pipeline.errors import ModelError
from pipeline.models.allocator import keep_freed_memory
from pipeline.models.compiling import check_compiler
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.one_image import Setup, edit_prepared
from pipeline.reading.prepare import prepare
from pipeline.reading.requests import asked_of
from pipeline.recipe import ModelConfig, Recipe, recipe_from
from pipeline.records import Prepared
from pipeline.running.worker import CPU_CALL_SIZE
from pipeline.samples import Sample

TINY_SD = Path(__file__).parents[1] / "tests" / "golden" / "tiny-sd"
SIZE = 256  # pixels
PARTS = 4  # of a case's images; diffusers edits one of them in a round
CONCEPTS = [
    {"prompt": "sunglasses", "guidance_scale": 5.0, "threshold": 0.9},
    {"prompt": "red hat", "guidance_scale": 4.0, "threshold": 0.85},
    {"prompt": "beard", "guidance_scale": 6.0, "threshold": 0.8, "direction": "remove"},
]


def theirs(folder: Path, unet: Any | None = None) -> LEditsPPPipelineStableDiffusion:
    """diffusers' pipeline on a checkpoint, with SDE DPM-Solver++ as its documentation recommends."""
    pipe = LEditsPPPipelineStableDiffusion(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet or UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(
            folder, subfolder="scheduler", algorithm_type="sde-dpmsolver++", solver_order=2
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_with_diffusers(
    pipe: Any, images: list[Image.Image], steps: int, edits: list[list[dict[str, Any]]], batch: int = 1
) -> None:
    """One image after the other, as its authors' script does; or in batches, which mix up heads and images there."""
    for start in range(0, len(images), batch):
        for concepts in edits:
            pipe.invert(image=images[start : start + batch], num_inversion_steps=steps, skip=0.15)
            pipe(
                editing_prompt=[concept["prompt"] for concept in concepts],
                edit_guidance_scale=[concept["guidance_scale"] for concept in concepts],
                edit_threshold=[concept["threshold"] for concept in concepts],
                edit_warmup_steps=[concept.get("warmup_steps", 0) for concept in concepts],
                reverse_editing_direction=[concept.get("direction") == "remove" for concept in concepts],
                use_cross_attn_mask=True,
                use_intersect_mask=True,
            )


def recipe_for(size: int, steps: int, edits: list[list[dict[str, Any]]]) -> Recipe:
    """The same work as a recipe."""
    return recipe_from(
        {
            "source": {"shards": "-"},
            "edits": {f"edit{number}": {"concepts": concepts} for number, concepts in enumerate(edits)},
            "model": {"size": size, "fit": "stretch"},
            "inversion": {"method": "ddpm", "num_steps": steps},
            "sink": {"folder": "-"},
        }
    )


def prepared(images: list[Image.Image], recipe: Recipe, size: int) -> list[Prepared]:
    """Images as the flow hands them to the engine."""
    samples = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        samples.append(Sample(id=str(number), shard="", key=str(number), index=number, image=buffer.getvalue()))
    return [prepare(asked_of(sample, recipe), recipe, size=size, multiple=32) for sample in samples]


def edit_with_engine(engine: Engine, inputs: list[Prepared], recipe: Recipe) -> None:
    """All images through one engine."""
    setup = Setup(methods=recipe.all_methods, run_seed=0)
    for finished in engine.run(edit_prepared(one, setup, engine.backbone) for one in inputs):
        if finished.error is not None:
            raise finished.error


def photographs(count: int, size: int) -> list[Image.Image]:
    """Random smooth pictures; what is on them does not matter for time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count, 3, 8, 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return [Image.fromarray((picture.permute(1, 2, 0) * 255).to(torch.uint8).numpy()) for picture in smooth]


def wide_unet() -> UNet2DConditionModel:
    """Wide enough that arithmetic, not overhead, takes the time on a few CPU cores."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(128, 256, 384),
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def with_unet(backbone: StableDiffusion, unet: UNet2DConditionModel) -> StableDiffusion:
    """The tiny checkpoint around another UNet, which runs as that of the first."""
    made = StableDiffusion(
        unet=unet,
        autoencoder=backbone.autoencoder,
        text=backbone.text,
        schedule=backbone.schedule,
        offers=backbone.offers,
        record=ModelRecord(name="wide", revision="", digest="", dtype="float32", device="cpu"),
        device=backbone.device,
    )
    made.tune(backbone.tuning)
    return made


def rows(steps: int, edits: list[list[dict[str, Any]]]) -> tuple[int, int]:
    """Network rows of one image: diffusers' and ours, by the formulas of LEDITS++'s specification."""
    reference = sum(steps + steps * (1 + len(concepts)) for concepts in edits)
    lossless = steps
    for concepts in edits:
        warmups = [concept.get("warmup_steps", 0) for concept in concepts]
        lossless += sum(1 + sum(warmup <= step for warmup in warmups) for step in range(min(warmups), steps))
        # The first step that they act in is the same in all of a case's edits, and computed once.
        first = 1 + sum(warmup == min(warmups) for warmup in warmups)
    return reference, lossless - first * (len(edits) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    wide: bool
    images: int
    steps: int
    edits: list[list[dict[str, Any]]]


class Theirs:
    """diffusers' side of a case."""

    def __init__(self, case: Case) -> None:
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()  # of a second of reading; it tears the tables
        self.case, self.pipe = case, theirs(TINY_SD, wide_unet() if case.wide else None)
        self.pictures = photographs(case.images, SIZE)

    def edit(self, count: int) -> None:
        """Edit so many images."""
        edit_with_diffusers(self.pipe, self.pictures[:count], self.case.steps, self.case.edits)

    @property
    def padded_share(self) -> float:
        """It fills up no call."""
        return 0.0


class Ours:
    """The engine's side of a case."""

    compiled = False

    def __init__(self, case: Case) -> None:
        keep_freed_memory()  # as the command line and workers do
        backbone = load_backbone(ModelConfig(name=str(TINY_SD), compile=self.compiled), device="cpu")
        assert isinstance(backbone, StableDiffusion)
        if case.wide:
            backbone = with_unet(backbone, wide_unet())
        self.engine = Engine(backbone, call_size=CPU_CALL_SIZE)
        self.recipe = recipe_for(SIZE, case.steps, case.edits)
        self.inputs = prepared(photographs(case.images, SIZE), self.recipe, SIZE)

    def edit(self, count: int) -> None:
        """Edit so many images."""
        self.engine.stats = EngineStats()  # of the last, measured round
        edit_with_engine(self.engine, self.inputs[:count], self.recipe)

    @property
    def padded_share(self) -> float:
        """Share of the rows computed that only filled up a call."""
        stats = self.engine.stats
        return stats.padded_rows / (stats.padded_rows + stats.network_rows - stats.shared_rows)


class OursCompiled(Ours):
    """The same with `model.compile`."""

    compiled = True


class Process:
    """One side of a case, in a process of its own."""

    side: ClassVar[Theirs | Ours]  # in the child

    def __init__(self, kind: type[Theirs | Ours], case: Case) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=Process._begin, initargs=(kind, case))

    def seconds(self, count: int) -> tuple[float, float]:
        """Time to edit so many images, and the share of padding."""
        return self.pool.submit(Process._edit, count).result()

    @classmethod
    def _begin(cls, kind: type[Theirs | Ours], case: Case) -> None:
        cls.side = kind(case)

    @classmethod
    def _edit(cls, count: int) -> tuple[float, float]:
        started = time.perf_counter()
        cls.side.edit(count)
        return time.perf_counter() - started, cls.side.padded_share


def can_compile() -> bool:
    """Whether there is a compiler, and so a third side."""
    try:
        check_compiler(torch.device("cpu"))
    except ModelError as error:
        print(f"Not measured compiled: {error}")
        return False
    return True


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the table: medians over the rounds; of the ratios, too.

    In a round diffusers edits some of the images and the engine all of them, so that the sides take turns as often as
    they can: a machine that is shared is slower in one minute than in the next.
    """
    kinds: dict[str, type[Theirs | Ours]] = {"diffusers": Theirs, "engine": Ours}
    if can_compile():
        kinds["compiled"] = OursCompiled
    times: dict[str, list[float]] = {name: [] for name in kinds}
    padded = 0.0
    with ExitStack() as stack:
        sides = {name: Process(kind, case) for name, kind in kinds.items()}
        for side in sides.values():
            stack.enter_context(side.pool)
            side.seconds(1)  # not counted: kernels, caches, the compiler
        for _ in range(rounds):
            for name, side in sides.items():
                parts = PARTS if name == "diffusers" else 1
                seconds, padded = side.seconds(case.images // parts)
                times[name].append(seconds * parts)
    slow = times.pop("diffusers")
    reference, lossless = rows(case.steps, case.edits)
    return {
        "case": case.name,
        "images": case.images,
        "diffusers_seconds": round(statistics.median(slow), 2),
        **{f"{name}_seconds": round(statistics.median(seconds), 2) for name, seconds in times.items()},
        **{
            f"{name}_ratio": round(statistics.median(s / t for s, t in zip(slow, seconds, strict=True)), 2)
            for name, seconds in times.items()
        },
        "row_ratio": round(reference / lossless, 2),
        "padded_share": round(padded, 3),
    }


def with_warmup(steps: int) -> list[dict[str, Any]]:
    """The three concepts, each waiting for a fifth of the steps."""
    return [{**concept, "warmup_steps": steps // 5} for concept in CONCEPTS]


def four_edits(concepts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Four variants of one image: one inversion for us, four for the reference."""
    return [
        [{**concept, "guidance_scale": concept["guidance_scale"] + extra} for concept in concepts] for extra in range(4)
    ]


def cases() -> list[Case]:
    """All rows of the table."""
    tiny: dict[str, Any] = {"wide": False, "steps": 20}
    wide: dict[str, Any] = {"wide": True, "images": 8, "steps": 10}
    return [
        Case(name="tiny, three concepts", images=8, edits=[CONCEPTS], **tiny),
        Case(name="tiny, warm-ups of a fifth", images=8, edits=[with_warmup(20)], **tiny),
        Case(name="tiny, four edits of each image", images=4, edits=four_edits(CONCEPTS), **tiny),
        Case(name="tiny, four edits with warm-ups", images=4, edits=four_edits(with_warmup(20)), **tiny),
        Case(name="wide, three concepts", edits=[CONCEPTS], **wide),
        Case(name="wide, warm-ups of a fifth", edits=[with_warmup(10)], **wide),
    ]


def measure(rounds: int = 4) -> list[dict[str, Any]]:
    """The whole table."""
    return [compare(case, rounds) for case in cases()]


if __name__ == "__main__":
    for case in cases():
        print(compare(case, rounds=4), flush=True)
