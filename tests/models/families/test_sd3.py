"""`sd3`: what it tells its network, against diffusers' own pipeline; with and without T5; what its rows share."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from pipeline.editor import Editor
from pipeline.engine.engine import Engine
from pipeline.errors import EditError, ModelError, RecipeError
from pipeline.looking.check_model.agreement import TOLERANCE
from pipeline.models.families.sd3 import StableDiffusion3Family
from pipeline.models.loading import find_checkpoint, load_backbone
from pipeline.models.outline import outline_of
from pipeline.models.parity import Sampling, sampled_by_diffusers
from pipeline.recipe import ModelConfig
from tests.checkpoints import change, refused
from tests.golden.replay import TINY_SD3
from tests.models.families.flow import OF_A_UNET, Pair, able_pairs, alone, edited, noise, predicted, sampled, whole
from tests.models.families.published import FLOW, PNDM, PUBLISHED, SD3_TRANSFORMER, Files, put, sd3
from tests.models.families.test_families import offered, with_index
from tests.test_every_pair import PAIRS

PROMPT = "a photo of a cat with a hat"


@cache
def tiny_sd3(**config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(TINY_SD3), **config), device="cpu")


@cache
def theirs(*, t5: bool = True) -> StableDiffusion3Pipeline:
    without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(TINY_SD3, **without)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny SD3, for a test to spoil."""
    return Path(shutil.copytree(TINY_SD3, tmp_path / "model"))


ABLE = able_pairs(tiny_sd3().offers)


@pytest.mark.parametrize(("t5", "places"), [(True, 256), (True, 64), (False, 256)])
def test_text_is_what_diffusers_pipeline_makes_of_it(t5: bool, places: int) -> None:
    ours = tiny_sd3(t5=t5, text_tokens=places)
    with torch.no_grad():
        of_theirs = theirs(t5=t5).encode_prompt(
            PROMPT, None, None, device="cpu", max_sequence_length=places, do_classifier_free_guidance=True
        )
    for prompt, embedding, pooled in ((PROMPT, *of_theirs[::2]), ("", *of_theirs[1::2])):
        parts = ours.encode_text(prompt).parts
        assert parts["embedding"].shape == (77 + places, 48)
        torch.testing.assert_close(parts["embedding"], embedding[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(parts["pooled"], pooled[0], atol=1e-5, rtol=1e-5)
    assert bool(ours.encode_text(PROMPT).embedding[77:].any()) == t5


def test_a_word_has_a_place_among_clips_keys_and_one_among_t5s() -> None:
    conditioning = tiny_sd3().encode_text(PROMPT)
    assert conditioning.places_of({PROMPT.split().index("cat"), PROMPT.split().index("hat")}) == [5, 8, 81, 84]
    assert tiny_sd3().encode_text("").positions == ()
    assert tiny_sd3(t5=False).encode_text(PROMPT).positions == tuple(range(1, 9))


def test_rows_of_other_prompts_and_levels_share_a_call_and_keep_their_bits() -> None:
    backbone, sigmas = tiny_sd3(), [1.0, 0.7, 0.3, 0.0]
    told = [backbone.encode_text(prompt) for prompt in (PROMPT, "snow", "", "a dog")]
    latents = noise(backbone, 4)
    together = predicted(backbone, latents, sigmas, told, 4)
    for row in range(4):
        one = predicted(backbone, latents[row : row + 1], sigmas[row : row + 1], told[row : row + 1], 4)
        assert torch.equal(one[0], together[row])
    assert not torch.allclose(together[0], together[1], rtol=0.1)


@pytest.mark.parametrize("config", [{}, {"t5": False}, {"text_tokens": 32}], ids=str)
def test_diffusers_pipeline_samples_the_same(config: dict[str, Any]) -> None:
    backbone = tiny_sd3(**config)
    family, checkpoint, _ = find_checkpoint(ModelConfig(name=str(TINY_SD3), **config))
    sampling = Sampling(prompt=PROMPT, noise=noise(backbone, 1)[0], num_steps=3, guidance_scale=5.0)
    reference = sampled_by_diffusers(family, checkpoint, backbone, sampling)
    assert reference is not None
    assert reference.pipeline == "StableDiffusion3Pipeline"
    difference = (sampled(backbone, sampling) - reference.latents).abs().max() / reference.latents.abs().max()
    assert difference < TOLERANCE["float32"] / 10


def test_what_needs_no_unet_works_with_every_inversion_that_it_fits() -> None:
    assert {editor for _, editor in ABLE} >= {"cfg", "reconstruct", "ledits_pp", "diffedit", "fast_diffedit", "h_edit"}
    assert {inversion for inversion, _ in ABLE} >= {"ddim", "ddpm", "direct", "negative_prompt", "noise"}
    assert {pair for pair in PAIRS if pair not in ABLE} == {pair for pair in PAIRS if OF_A_UNET & {*pair}}


@pytest.fixture(scope="module")
def beside_all_others() -> dict[Pair, Tensor]:
    return edited(tiny_sd3(), ABLE)


@pytest.mark.parametrize("pair", ABLE, ids="+".join)
def test_a_pair_gives_the_same_finite_bits_alone_and_beside_all_others(
    pair: Pair, beside_all_others: dict[Pair, Tensor]
) -> None:
    latents = beside_all_others[pair]
    assert torch.isfinite(latents).all()
    assert torch.equal(alone(tiny_sd3(), pair), latents)


def test_edit_friendly_inversion_returns_the_image_exactly() -> None:
    trajectory, back = Engine(tiny_sd3(), call_size=8).run_one(whole(tiny_sd3(), ("ddpm", "reconstruct")))
    assert trajectory.levels[0].signal == 0.0
    torch.testing.assert_close(back.latents, trajectory.source.latents, atol=1e-5, rtol=0)


def test_it_edits_a_picture_and_says_what_it_cannot() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    with Editor.load(str(TINY_SD3), size=64, fit="bucket", device="cpu") as editor:
        result = editor.edit(
            pixels,
            "hat",
            inversion={"method": "ddpm", "num_steps": 3},
            editing={"method": "ledits_pp", "mask": "noise"},
        )
        assert result.image.size == (64, 40)
        assert not np.array_equal(np.asarray(result.image), pixels)
        with pytest.raises(RecipeError, match="no such maps"):
            editor.edit(pixels, "hat", editing={"method": "ledits_pp", "mask": "attention"})
        with pytest.raises(RecipeError, match="no gradients to them"):
            editor.edit(pixels, target_prompt="a dog", inversion={"method": "null_text"}, editing={"method": "cfg"})


def test_an_image_beyond_the_table_of_positions_is_refused_with_the_largest_side() -> None:
    with pytest.raises(ModelError, match=r"model\.size 400 is larger than .*ends at 384 pixels\. Set model"):
        load_backbone(ModelConfig(name=str(TINY_SD3), size=400), device="cpu")
    with pytest.raises(EditError, match=r"a side of 400 pixels, and .* ends at 384"):
        predicted(tiny_sd3(), noise(tiny_sd3(), 1, 2, 50), [0.5], [tiny_sd3().encode_text("")], 1)


def test_half_precision_keeps_the_autoencoder_in_float32_and_t5_out_of_float16() -> None:
    backbone = tiny_sd3(dtype="float16")
    assert backbone.velocity.transformer.dtype == torch.float16
    assert backbone.autoencoder.vae.dtype == torch.float32
    assert backbone.text.t5.encoder.dtype == torch.bfloat16
    velocity = predicted(backbone, noise(backbone, 1), [0.5], [backbone.encode_text(PROMPT)], 1)
    assert velocity.dtype == torch.float32
    assert torch.isfinite(velocity).all()


@pytest.mark.parametrize("t5", [True, False])
def test_what_files_tell_without_weights_is_what_the_loaded_model_offers(t5: bool) -> None:
    outline = outline_of(ModelConfig(name=str(TINY_SD3), t5=t5))
    assert outline.offers is not None
    assert dataclasses.asdict(outline.offers) == dataclasses.asdict(tiny_sd3(t5=t5).offers)
    assert len(outline.tokenizers) == 2 + t5
    assert outline.read_part("cat " * 99) == " ".join(["cat"] * 75)


def test_a_checkpoint_that_comes_without_t5_needs_none_of_its_files(checkpoint: Path) -> None:
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(checkpoint / part)
    refused(checkpoint, "text_encoder_3")
    index = json.loads((checkpoint / "model_index.json").read_text())
    change(checkpoint / "model_index.json", **{**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    backbone = load_backbone(ModelConfig(name=str(checkpoint)), device="cpu")
    assert torch.equal(backbone.encode_text(PROMPT).embedding, tiny_sd3(t5=False).encode_text(PROMPT).embedding)
    assert backbone.record.digest == tiny_sd3(t5=False).record.digest != tiny_sd3().record.digest


def test_settings_of_other_models_are_refused() -> None:
    for config, reason in (
        ({"embedded_guidance": 3.5}, "network takes no guidance scale"),
        ({"empty_prompt": "zeros"}, "was not trained with zeros"),
    ):
        with pytest.raises(ModelError, match=reason):
            load_backbone(ModelConfig(name=str(TINY_SD3), **config), device="cpu")


REFUSED: dict[str, tuple[Files, str]] = {
    "another scheduler": (sd3(PNDM), "with the scheduler PNDMScheduler; known for it is FlowMatchEuler"),
    "another scheduler in model_index.json alone": (
        with_index(sd3(), scheduler=["diffusers", "PNDMScheduler"]),
        "with the scheduler PNDMScheduler",
    ),
    "Karras's levels": (sd3({**FLOW, "use_karras_sigmas": True}), "has use_karras_sigmas: its levels are Karras's"),
    "a shift that is none": (sd3({**FLOW, "shift": 0}), "has shift 0, which is no positive number"),
    "a transformer that takes a control image": (
        sd3(FLOW, {**SD3_TRANSFORMER, "in_channels": 33}),
        "a transformer of 33 input channels on latents of 16 channels, of which it would take 16",
    ),
    "no second text encoder": (
        with_index(sd3(), text_encoder_2=[None, None]),
        "has no text_encoder_2 in its model_index.json, and StableDiffusion3Pipeline needs one",
    ),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_sd3_is_refused_by_its_files(files: Files, reason: str, tmp_path: Path) -> None:
    refused(put(tmp_path, files), reason)


@pytest.mark.parametrize(
    "name", ["stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3.5-medium"]
)
def test_published_checkpoints_are_known_by_their_files(name: str, tmp_path: Path) -> None:
    assert offered(PUBLISHED[name], tmp_path).distilled == ""
    parts = {file.split("/")[0] for file in PUBLISHED[name] if "/" in file}
    assert parts == set(StableDiffusion3Family.components)
