"""Checkpoints: what loads, and what is refused with which reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine.calls import NetworkCall
from pipeline.engine.pictures import decode_picture, encode_picture
from pipeline.errors import ModelError
from pipeline.models.checkpoint import Checkpoint, digest, open_checkpoint
from pipeline.models.families.stable_diffusion import StableDiffusionFamily
from pipeline.models.loading import load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.models.unet import attention_layers, cross_attention_factors
from pipeline.recipe import ModelConfig
from tests.checkpoints import change, refused, small_unet
from tests.golden.replay import TINY_SD
from tests.methods import levels, tiny_sd


def opened(folder: Path, variant: str | None = None) -> Checkpoint:
    return open_checkpoint(folder, StableDiffusionFamily.components, variant, "it")


def test_a_folder_loads_and_its_record_says_what_it_is() -> None:
    record = tiny_sd().record
    assert (record.revision, record.dtype, record.device) == ("", "float32", "cpu")
    assert record.digest == digest(opened(TINY_SD))
    assert len(record.digest) == 16
    assert (tiny_sd().image_size, tiny_sd().latent_scale, tiny_sd().multiple) == (512, 8, 32)


@pytest.mark.parametrize(("size", "others"), [(80, "64 or 96"), (33, "32 or 64")])
def test_a_size_that_the_model_cannot_take_is_refused_when_it_is_loaded(size: int, others: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.size {size} is not a multiple of 32.* Set model\.size to {others}$"):
        load_backbone(ModelConfig(name=str(TINY_SD), size=size), device="cpu")
    with pytest.raises(ModelError, match="not a multiple of 16"):
        load_backbone(ModelConfig(name="analytic", size=40))
    load_backbone(ModelConfig(name="analytic", size=40, fit="bucket"))  # its sides become multiples


def test_the_digest_follows_every_file_that_is_loaded(checkpoint: Path) -> None:
    def digest_now() -> str:
        return digest(opened(checkpoint))

    start = digest_now()
    assert start == tiny_sd().record.digest
    for name in (
        "vae/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ):
        content = (checkpoint / name).read_bytes()
        spoilt = content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("safetensors") else content + b" "
        (checkpoint / name).write_bytes(spoilt)
        assert digest_now() != start, name
        (checkpoint / name).write_bytes(content)
    assert digest_now() == start


def test_files_that_are_not_loaded_do_not_change_the_digest(checkpoint: Path) -> None:
    for name in (
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/notes.txt",
        "text_encoder/generation_config.json",
    ):
        (checkpoint / name).write_bytes(b"{}")
    assert digest(opened(checkpoint)) == tiny_sd().record.digest


def test_variants_have_digests_of_their_own_and_equal_files_one(checkpoint: Path) -> None:
    plain = digest(opened(checkpoint))
    for path in list(checkpoint.rglob("*.safetensors")):
        shutil.copy(path, path.with_suffix(".same.safetensors"))
        tensors = {key: tensor * 2 if tensor.is_floating_point() else tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path.with_suffix(".other.safetensors"), {"format": "pt"})
    assert digest(opened(checkpoint, "same")) == plain
    assert digest(opened(checkpoint, "other")) != plain
    assert digest(opened(checkpoint)) == plain


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(checkpoint, r"only pickled weights \(diffusion_pytorch_model.bin\), which can run code in unet/")


def test_missing_weights_are_named(checkpoint: Path) -> None:
    (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(checkpoint, "no weights in vae/")


def test_remote_code_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Model"})
    refused(checkpoint, "remote code")


def test_a_component_of_custom_code_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", unet=["my_unet", "MyUNet"])
    refused(checkpoint, r"\['my_unet', 'MyUNet'\] as unet")


def test_another_kind_of_pipeline_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    refused(checkpoint, "T5EncoderModel")


def test_a_unet_that_is_neither_plain_nor_for_inpainting_is_refused_by_its_channels(checkpoint: Path) -> None:
    change(checkpoint / "unet" / "config.json", in_channels=8)
    refused(checkpoint, "8 input channels on latents of 4")


def test_a_single_file_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no model_index.json")


def test_a_missing_folder_is_named() -> None:
    refused(Path("/no/such/model"), "is no folder here and no hub id")


def test_loading_changes_nothing_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging

    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the allocator was set"))

    def settings() -> dict[str, object]:
        return {
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "random numbers": torch.random.get_rng_state().tolist(),
            "bars": logging.is_progress_bar_enabled(),
            "verbosity": (logging.get_verbosity(), of_diffusers.get_verbosity()),
            "environment": dict(os.environ),
        }

    before = settings()
    load_backbone(ModelConfig(name=str(TINY_SD)), device="cpu")
    assert settings() == before


def test_v_prediction_and_trailing_steps_are_read_from_the_checkpoint(checkpoint: Path) -> None:
    change(
        checkpoint / "scheduler" / "scheduler_config.json",
        prediction_type="v_prediction", timestep_spacing="trailing", beta_schedule="linear",
    )  # fmt: skip
    schedule = load_backbone(ModelConfig(name=str(checkpoint)), device="cpu").schedule
    assert (schedule.prediction_type, schedule.spacing) == ("v_prediction", "trailing")
    assert schedule.alpha_bars != tiny_sd().schedule.alpha_bars


def test_bfloat16_networks_leave_latents_in_float32(checkpoint: Path) -> None:
    backbone = load_backbone(ModelConfig(name=str(checkpoint), dtype="bfloat16"), device="cpu")
    assert isinstance(backbone, StableDiffusion)
    assert backbone.unet.dtype == torch.bfloat16
    prompt = backbone.encode_text("a cat")
    noise_preds = backbone.denoise(
        NetworkCall(torch.zeros((1, 4, 8, 8)), levels(backbone, [501]), [prompt])
    ).predictions.noise
    assert noise_preds.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "expected"),
    [
        ("float16", True, torch.float32),
        ("float16", None, torch.float32),
        ("float16", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
    ],
)
def test_in_float16_the_vae_runs_in_float32_unless_its_checkpoint_waives_that(
    dtype: Literal["float16", "bfloat16"], force_upcast: bool | None, expected: torch.dtype, checkpoint: Path
) -> None:
    config = checkpoint / "vae" / "config.json"
    values = {key: value for key, value in json.loads(config.read_text()).items() if key != "force_upcast"}
    config.write_text(json.dumps(values if force_upcast is None else {**values, "force_upcast": force_upcast}))
    backbone = load_backbone(ModelConfig(name=str(checkpoint), dtype=dtype), device="cpu")
    assert isinstance(backbone, StableDiffusion)
    assert backbone.autoencoder.vae.dtype == expected
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    latents = encode_picture(backbone, pixels)
    assert torch.equal(latents, encode_picture(tiny_sd(), pixels)) == (expected == torch.float32)
    decoded_alike = np.array_equal(decode_picture(backbone, latents), decode_picture(tiny_sd(), latents))
    assert decoded_alike or expected != torch.float32


@pytest.mark.parametrize(("prompt", "count"), [("", 0), ("cat", 1), ("cat with sunglasses", 3), ("old man", 3)])
def test_tokens_are_counted_before_padding(prompt: str, count: int) -> None:
    encoded = tiny_sd().encode_text(prompt)
    assert encoded.positions == tuple(range(1, 1 + count))
    assert encoded.embedding.shape == (77, 32)


def test_a_prompt_longer_than_the_encoder_is_cut() -> None:
    assert len(tiny_sd().encode_text("cat " * 200).positions) == 75


def test_layers_are_told_by_name() -> None:
    backbone = tiny_sd()
    assert isinstance(backbone, StableDiffusion)
    layers = list(attention_layers(backbone.unet).values())
    # The table of SD 1.x: each transformer block has a self- and a cross-attention, the mid block comes between.
    factors = [layer.factor for layer in layers if layer.kind == "self"]
    assert factors == [1, 1, 2, 2, 4, 4, 8, *[4] * 3, *[2] * 3, *[1] * 3]
    assert [layer.index for layer in layers if layer.kind == "cross"] == list(range(16))
    assert [layer.index for layer in layers if layer.place == "up" and layer.kind == "self"] == list(range(7, 16))
    assert [layer.index_in_place for layer in layers if layer.place == "up" and layer.kind == "self"] == list(range(9))
    assert cross_attention_factors(backbone.unet) == (1, 2, 4)
    assert list(backbone.offers.openings.layers) == [layer for layer in layers if layer.kind == "self"]
    assert backbone.offers.openings.watched == {4, 5, 7, 8, 9}  # SD 1.x: two on the way down, three on the way up
    transformers = backbone.offers.openings.transformers
    assert [(one.place, one.factor) for one in transformers] == [
        (layer.place, layer.factor) for layer in backbone.offers.openings.layers
    ]
    assert [block.factor for block in backbone.offers.openings.residuals] == [*[8] * 3, *[4] * 3, *[2] * 3, *[1] * 3]


def test_our_attention_equals_the_librarys() -> None:
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel.from_pretrained(TINY_SD, subfolder="unet").eval()
    backbone = tiny_sd()
    prompt = backbone.encode_text("a cat with sunglasses")
    latents = torch.randn((2, 4, 12, 12), generator=torch.Generator().manual_seed(0))
    ours = backbone.denoise(NetworkCall(latents, levels(backbone, [501, 21]), [prompt] * 2)).predictions.noise
    with torch.no_grad():
        embeddings = torch.stack([prompt.embedding] * 2)
        theirs = plain(latents, torch.tensor([501, 21]), encoder_hidden_states=embeddings).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_mid_block_at_a_quarter_of_the_side_is_not_watched(checkpoint: Path) -> None:
    small_unet(checkpoint)
    backbone = load_backbone(ModelConfig(name=str(checkpoint)), device="cpu")
    assert isinstance(backbone, StableDiffusion)
    openings = backbone.offers.openings
    watched = [layer.place for layer in openings.layers if layer.index in openings.watched]
    assert watched == ["down", "up", "up"]
    assert any(layer.place == "mid" and layer.factor == 4 for layer in openings.layers)


def test_latents_are_the_librarys_under_its_scaling_factor() -> None:
    from diffusers import AutoencoderKL

    plain = AutoencoderKL.from_pretrained(TINY_SD, subfolder="vae").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1.0
    with torch.no_grad():
        latents = plain.encode(images).latent_dist.mode() * plain.config.scaling_factor
        decoded = plain.decode(latents / plain.config.scaling_factor).sample[0].permute(1, 2, 0)
    assert plain.config.scaling_factor != 1.0
    torch.testing.assert_close(encode_picture(tiny_sd(), pixels), latents[0])
    expected = ((decoded.numpy() + 1.0) * 127.5).clip(0, 255)
    np.testing.assert_allclose(decode_picture(tiny_sd(), latents[0]), expected, atol=0.51)


def test_the_vae_round_trip_is_deterministic_and_keeps_its_range() -> None:
    backbone = tiny_sd()
    pixels = (torch.rand((64, 96, 3), generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8).numpy()
    latents = encode_picture(backbone, pixels)
    assert latents.shape == (4, 8, 12)
    assert torch.equal(latents, encode_picture(backbone, pixels))
    decoded = decode_picture(backbone, latents)
    assert (decoded.shape, str(decoded.dtype)) == ((64, 96, 3), "uint8")
