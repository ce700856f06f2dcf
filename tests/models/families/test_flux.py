"""`flux`: what it tells its network, against diffusers' own pipeline; guidance that a row is told; what rows share."""

from __future__ import annotations

import dataclasses
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from pipeline.diffusion.flow_schedule import level_of
from pipeline.editor import Editor
from pipeline.engine.calls import NetworkCall
from pipeline.errors import EditError, ModelError, RecipeError
from pipeline.looking.check_model.agreement import TOLERANCE
from pipeline.models.families.flux import FluxFamily, packed, places, unpacked
from pipeline.models.loading import find_checkpoint, load_backbone
from pipeline.models.outline import outline_of
from pipeline.models.parity import Sampling, sampled_by_diffusers
from pipeline.recipe import ModelConfig
from tests.checkpoints import change, refused
from tests.golden.replay import TINY_FLUX, TINY_SCHNELL
from tests.models.families.flow import OF_A_UNET, Pair, able_pairs, alone, edited, noise, predicted, sampled
from tests.models.families.published import FLOW, FLUX_TRANSFORMER, PNDM, PUBLISHED, Files, flux, put
from tests.models.families.test_families import offered, with_index
from tests.test_every_pair import PAIRS

PROMPT = "a photo of a cat with a hat"
PLACES = 32  # of T5: padding is most of what a tiny transformer computes


@cache
def tiny_flux(folder: Path = TINY_FLUX, *, text_tokens: int = PLACES, **config: Any) -> Any:
    return load_backbone(ModelConfig(name=str(folder), text_tokens=text_tokens, **config), device="cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny FLUX, for a test to spoil."""
    return Path(shutil.copytree(TINY_FLUX, tmp_path / "model"))


ABLE = able_pairs(tiny_flux().offers)


def told(prompt: str, guidance: float) -> Any:
    return tiny_flux().encode_text(prompt).replacing(guidance=torch.tensor(guidance))


@pytest.mark.parametrize(("folder", "usual"), [(TINY_FLUX, 512), (TINY_SCHNELL, 256)], ids=["dev", "schnell"])
def test_text_is_what_diffusers_pipeline_makes_of_it(folder: Path, usual: int) -> None:
    theirs = FluxPipeline.from_pretrained(folder)
    for places_, config in ((PLACES, {"text_tokens": PLACES}), (usual, {})):
        backbone = load_backbone(ModelConfig(name=str(folder), **config), device="cpu")
        parts = backbone.encode_text(PROMPT).parts
        with torch.no_grad():
            embedding, pooled, _ = theirs.encode_prompt(PROMPT, None, device="cpu", max_sequence_length=places_)
        assert parts["embedding"].shape == (places_, 32)
        torch.testing.assert_close(parts["embedding"], embedding[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(parts["pooled"], pooled[0], atol=1e-5, rtol=1e-5)
        assert parts.keys() - {"guidance"} == {"embedding", "pooled"}


def test_a_word_has_its_place_among_t5s_keys_alone() -> None:
    conditioning = tiny_flux().encode_text(PROMPT)
    assert conditioning.places_of({PROMPT.split().index("cat"), PROMPT.split().index("hat")}) == [4, 7]
    assert tiny_flux().encode_text("").positions == ()


def test_packing_puts_two_by_two_latents_into_a_token_and_comes_back() -> None:
    latents = torch.randn((2, 16, 6, 4), generator=torch.Generator().manual_seed(0))
    tokens = packed(latents)
    assert tokens.shape == (2, 6, 64)
    assert torch.equal(tokens[0, 0].reshape(16, 2, 2), latents[0, :, :2, :2])
    assert torch.equal(tokens[1, 3].reshape(16, 2, 2), latents[1, :, 2:4, 2:4])  # second row, second column
    assert torch.equal(unpacked(tokens, 6, 4), latents)
    assert places(6, 4, torch.device("cpu")).tolist() == [[0, row, column] for row in range(3) for column in range(2)]


def test_rows_of_other_prompts_levels_and_guidance_share_a_call_and_keep_their_bits() -> None:
    sigmas = [1.0, 0.7, 0.3, 0.3]
    conditioning = [told(PROMPT, 1.0), told("snow", 3.5), told("a dog", 1.0), told("a dog", 5.0)]
    latents = noise(tiny_flux(), 4)
    latents[3] = latents[2]
    together = predicted(tiny_flux(), latents, sigmas, conditioning, 4)
    for row in range(4):
        one = predicted(tiny_flux(), latents[row : row + 1], sigmas[row : row + 1], conditioning[row : row + 1], 4)
        assert torch.equal(one[0], together[row])
    assert not torch.allclose(together[2], together[3], rtol=0.01)  # they differ in their guidance alone


def test_the_recipe_says_what_guidance_a_row_is_told_where_its_method_does_not() -> None:
    latents = noise(tiny_flux(), 1)

    def velocity(backbone: Any) -> Tensor:
        return predicted(backbone, latents, [0.6], [backbone.encode_text(PROMPT)], 1)

    assert torch.equal(velocity(tiny_flux()), velocity(tiny_flux(embedded_guidance=1.0)))
    assert not torch.allclose(velocity(tiny_flux()), velocity(tiny_flux(embedded_guidance=3.5)), rtol=0.01)
    with pytest.raises(ModelError, match="takes no guidance scale"):
        tiny_flux(TINY_SCHNELL, embedded_guidance=3.5)
    with pytest.raises(ModelError, match=r"model\.t5 is false, and a FluxPipeline has no text encoder that it could"):
        tiny_flux(t5=False)


@pytest.mark.parametrize(
    ("folder", "config", "scale"), [(TINY_FLUX, {"embedded_guidance": 3.5}, 4.0), (TINY_SCHNELL, {}, 1.0)]
)
def test_diffusers_pipeline_samples_the_same(folder: Path, config: dict[str, Any], scale: float) -> None:
    backbone = tiny_flux(folder, **config)
    found = ModelConfig(name=str(folder), text_tokens=PLACES, **config)
    sampling = Sampling(prompt=PROMPT, noise=noise(backbone, 1)[0], num_steps=3, guidance_scale=scale)
    reference = sampled_by_diffusers(*find_checkpoint(found)[:2], backbone, sampling)
    assert reference is not None
    assert reference.pipeline == "FluxPipeline"
    difference = (sampled(backbone, sampling) - reference.latents).abs().max() / reference.latents.abs().max()
    assert difference < TOLERANCE["float32"] / 10


def test_levels_are_shifted_the_more_the_larger_the_image_is() -> None:
    small, large = (tiny_flux().schedule.steps(4, (side, side)) for side in (16, 128))
    assert [step.start.noise for step in (small[0], large[0])] == [1.0, 1.0]
    mu = 0.5 + 0.65 * (64 * 64 - 256) / (4096 - 256)  # of 4,096 tokens
    for step, share in zip(large, (1.0, 0.75, 0.5, 0.25), strict=True):
        assert step.start.noise == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / share - 1), rel=1e-6)
    assert all(one.start.noise < other.start.noise for one, other in zip(small[1:], large[1:], strict=True))
    assert tiny_flux(TINY_SCHNELL).schedule.sigmas(4, (16, 16)) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_what_needs_no_unet_works_with_every_inversion_that_it_fits() -> None:
    assert {editor for _, editor in ABLE} >= {"cfg", "reconstruct", "ledits_pp", "diffedit", "fast_diffedit", "h_edit"}
    assert {pair for pair in PAIRS if pair not in ABLE} == {pair for pair in PAIRS if OF_A_UNET & {*pair}}


@pytest.fixture(scope="module")
def beside_all_others() -> dict[Pair, Tensor]:
    return edited(tiny_flux(), ABLE)


@pytest.mark.parametrize("pair", ABLE, ids="+".join)
def test_a_pair_gives_the_same_finite_bits_alone_and_beside_all_others(
    pair: Pair, beside_all_others: dict[Pair, Tensor]
) -> None:
    latents = beside_all_others[pair]
    assert torch.isfinite(latents).all()
    assert torch.equal(alone(tiny_flux(), pair), latents)


def test_schnell_serves_what_neither_guides_nor_walks_backwards_and_says_why() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    target = {"target_prompt": "a dog", "inversion": {"method": "noise", "num_steps": 2}}
    with Editor.load(str(TINY_SCHNELL), size=64, text_tokens=PLACES, device="cpu") as editor:
        editing = {"method": "cfg", "guidance_scale": 1.0, "start_step": 1}
        assert not np.array_equal(np.asarray(editor.edit(pixels, **target, editing=editing).image), pixels)
        with pytest.raises(RecipeError, match=r"distilled into few unguided steps, as FLUX\.1-schnell"):
            editor.edit(pixels, **target, editing={"method": "cfg"})
        with pytest.raises(RecipeError, match="cannot be walked backwards"):
            editor.edit(pixels, "hat", inversion={"method": "ddpm"}, editing={"method": "ledits_pp", "mask": "noise"})


def test_inputs_beside_the_latents_are_refused() -> None:
    call = NetworkCall(
        noise(tiny_flux(), 1), [level_of(0.5)], [told("", 1.0)], beside={"inpaint": torch.zeros((1, 17, 8, 12))}
    )
    with pytest.raises(EditError, match="takes no inpaint beside the latents"):
        tiny_flux().denoise(call)


def test_bfloat16_hands_on_float32(checkpoint: Path) -> None:
    backbone = tiny_flux(dtype="bfloat16")
    velocity = predicted(backbone, noise(backbone, 1), [0.6], [backbone.encode_text(PROMPT)], 1)
    exact = predicted(tiny_flux(), noise(backbone, 1), [0.6], [tiny_flux().encode_text(PROMPT)], 1)
    assert backbone.velocity.transformer.dtype == torch.bfloat16
    assert velocity.dtype == torch.float32
    assert 0 < float((velocity - exact).norm() / exact.norm()) < 0.1


def test_parts_that_were_not_made_for_each_other_are_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "text_encoder_2")
    shutil.copytree(TINY_SCHNELL.parent / "tiny-sd3" / "text_encoder_3", checkpoint / "text_encoder_2")
    refused(checkpoint, "reads embeddings of 32 numbers, and text encoders that make them of 48")


def test_what_files_tell_without_weights_is_what_the_loaded_model_offers() -> None:
    for folder in (TINY_FLUX, TINY_SCHNELL):
        outline = outline_of(ModelConfig(name=str(folder)))
        assert outline.offers is not None
        assert dataclasses.asdict(outline.offers) == dataclasses.asdict(tiny_flux(folder).offers)
    assert tiny_flux().offers.embedded_guidance


DYNAMIC = {**FLOW, "use_dynamic_shifting": True}
REFUSED: dict[str, tuple[Files, str]] = {
    "another scheduler": (flux(PNDM), "with the scheduler PNDMScheduler; known for it is FlowMatchEuler"),
    "another kind of shift": (flux({**DYNAMIC, "time_shift_type": "log"}), "has time_shift_type 'log'"),
    "a line without a slope": (
        flux({**DYNAMIC, "max_image_seq_len": 256}),
        "base_image_seq_len 256, which is not below max_image_seq_len 256",
    ),
    "FLUX.1-Fill": (PUBLISHED["black-forest-labs/FLUX.1-Fill-dev"], "saved from the pipeline FluxFillPipeline"),
    "the transformer of FLUX.1-Fill": (
        flux(DYNAMIC, {**FLUX_TRANSFORMER, "in_channels": 384}),
        "a transformer of 384 input channels on latents of 16 channels, of which it would take 64",
    ),
    "no T5": (with_index(flux(DYNAMIC), text_encoder_2=[None, None]), "has no text_encoder_2 in its model_index.json"),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_flux_is_refused_by_its_files(files: Files, reason: str, tmp_path: Path) -> None:
    refused(put(tmp_path, files), reason)


def test_published_checkpoints_are_known_by_their_files(tmp_path: Path) -> None:
    dev, schnell = (f"black-forest-labs/FLUX.1-{kind}" for kind in ("dev", "schnell"))
    assert offered(PUBLISHED[dev], tmp_path / "dev").distilled == ""
    assert "guidance_embeds is false" in offered(PUBLISHED[schnell], tmp_path / "schnell").distilled
    assert {file.split("/")[0] for file in PUBLISHED[dev] if "/" in file} == set(FluxFamily.components)


def test_the_digest_follows_the_scheduler(checkpoint: Path) -> None:
    change(checkpoint / "scheduler" / "scheduler_config.json", max_shift=1.2)
    assert load_backbone(ModelConfig(name=str(checkpoint)), device="cpu").record.digest != tiny_flux().record.digest
