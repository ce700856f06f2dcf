"""The engine against the maintained LEDITS++ pipeline of diffusers: same model, images, steps and concepts.

Ratios of whole edits (encode, invert, edit, decode), measured in turns within one process. Two models: the random
tiny Stable Diffusion, whose calls cost mostly overhead, and a wide UNet that keeps this machine's cores busy, where
only saved rows can make a difference.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline.engine.engine import Engine, EngineStats
from pipeline.flow import edit_prepared
from pipeline.models.backbone import ModelRecord
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.reading.prepare import prepare
from pipeline.recipe import ModelConfig, Recipe, recipe_from
from pipeline.records import Prepared, Sample
from pipeline.worker import CPU_CALL_SIZE

TINY_SD = Path(__file__).parents[1] / "tests" / "golden" / "tiny-sd"
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
    pipe: LEditsPPPipelineStableDiffusion, images: list[Image.Image], steps: int, edits: list[list[dict[str, Any]]]
) -> None:
    """One image after the other, as its authors' script does: batches mix up heads and images there."""
    for image in images:
        for concepts in edits:
            pipe.invert(image=image, num_inversion_steps=steps, skip=0.15)
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
    import io

    samples = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        samples.append(Sample(id=str(number), shard="", key=str(number), index=number, image=buffer.getvalue()))
    return [prepare(sample, recipe, size=size, multiple=32) for sample in samples]


def edit_with_engine(engine: Engine, inputs: list[Prepared], recipe: Recipe) -> None:
    """All images through one engine."""
    for finished in engine.run(edit_prepared(one, recipe.all_methods, 0, engine.backbone) for one in inputs):
        if finished.error is not None:
            raise finished.error


def in_turns(first: Callable[[int], None], second: Callable[[int], None], images: int, rounds: int) -> list[float]:
    """Median seconds of each, and the median of their ratios round by round; one unmeasured image each first."""
    first(1)
    second(1)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        first(images)
        middle = time.perf_counter()
        second(images)
        times.append((middle - started, time.perf_counter() - middle))
    return [statistics.median(column) for column in zip(*((a, b, a / b) for a, b in times), strict=True)]


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
    """The tiny checkpoint around another UNet."""
    return StableDiffusion(
        unet=unet,
        vae=backbone.vae,
        text_encoder=backbone.text_encoder,
        tokenizer=backbone.tokenizer,
        schedule=backbone.schedule,
        record=ModelRecord(name="wide", revision="", digest="", dtype="float32", device="cpu"),
        device=backbone.device,
    )


def rows(steps: int, edits: list[list[dict[str, Any]]]) -> tuple[int, int]:
    """UNet rows of one image: diffusers' and ours, by the formulas of LEDITS++'s specification."""
    reference = sum(steps + steps * (1 + len(concepts)) for concepts in edits)
    lossless = steps
    for concepts in edits:
        warmups = [concept.get("warmup_steps", 0) for concept in concepts]
        lossless += sum(1 + sum(warmup <= step for warmup in warmups) for step in range(min(warmups), steps))
    return reference, lossless


def compare(name: str, *, wide: bool, images: int, steps: int, edits: list[list[dict[str, Any]]], rounds: int) -> dict:
    """One row of the table."""
    warnings.simplefilter("ignore")
    size = 256
    backbone = load_backbone(ModelConfig(name=str(TINY_SD)), device="cpu")
    assert isinstance(backbone, StableDiffusion)
    pipe_unet = wide_unet() if wide else None
    if wide:
        backbone = with_unet(backbone, wide_unet())
    pipe = theirs(TINY_SD, pipe_unet)
    pictures = photographs(images, size)
    recipe = recipe_for(size, steps, edits)
    inputs = prepared(pictures, recipe, size)
    engine = Engine(backbone, call_size=CPU_CALL_SIZE)

    def ours(count: int) -> None:
        engine.stats = EngineStats()  # of the last, measured round
        edit_with_engine(engine, inputs[:count], recipe)

    slow, fast, ratio = in_turns(
        lambda count: edit_with_diffusers(pipe, pictures[:count], steps, edits), ours, images, rounds
    )
    reference, lossless = rows(steps, edits)
    return {
        "case": name,
        "images": images,
        "diffusers_seconds": round(slow, 2),
        "engine_seconds": round(fast, 2),
        "ratio": round(ratio, 2),
        "row_ratio": round(reference / lossless, 2),
        "padded_share": round(engine.stats.padded_rows / (engine.stats.padded_rows + engine.stats.unet_rows), 3),
    }


def with_warmup(steps: int) -> list[dict[str, Any]]:
    """The three concepts, each waiting for a fifth of the steps."""
    return [{**concept, "warmup_steps": steps // 5} for concept in CONCEPTS]


def four_edits() -> list[list[dict[str, Any]]]:
    """Four variants of one image: one inversion for us, four for the reference."""
    return [
        [{**concept, "guidance_scale": concept["guidance_scale"] + extra} for concept in CONCEPTS] for extra in range(4)
    ]


def measure(rounds: int = 2) -> list[dict[str, Any]]:
    """The whole table."""
    tiny = {"wide": False, "images": 8, "steps": 20, "rounds": rounds}
    wide = {"wide": True, "images": 8, "steps": 10, "rounds": rounds}
    return [
        compare("tiny, three concepts", edits=[CONCEPTS], **tiny),
        compare("tiny, warm-ups of a fifth", edits=[with_warmup(20)], **tiny),
        compare("tiny, four edits of each image", edits=four_edits(), **(tiny | {"images": 4})),
        compare("wide, three concepts", edits=[CONCEPTS], **wide),
        compare("wide, warm-ups of a fifth", edits=[with_warmup(10)], **wide),
    ]


if __name__ == "__main__":
    for row in measure():
        print(row)
