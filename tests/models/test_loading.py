"""Checkpoints: what loads, and what is refused with which reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.engine.calls import UNetCall
from pipeline.errors import ModelError
from pipeline.models.attention import attention_layers, cross_attention_factors
from pipeline.models.loading import digest, load_backbone
from pipeline.models.stable_diffusion import StableDiffusion
from pipeline.recipe import ModelConfig
from tests.checkpoints import change, refused
from tests.golden.replay import TINY_SD
from tests.methods import tiny_sd


def test_a_folder_loads_and_its_record_says_what_it_is() -> None:
    record = tiny_sd().record
    assert (record.revision, record.dtype, record.device) == ("", "float32", "cpu")
    assert record.digest == digest(TINY_SD)
    assert len(record.digest) == 16
    assert (tiny_sd().image_size, tiny_sd().latent_scale, tiny_sd().multiple) == (512, 8, 32)


def test_the_digest_follows_the_weights(checkpoint: Path) -> None:
    assert digest(checkpoint) == digest(TINY_SD)
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert digest(checkpoint) != digest(TINY_SD)


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


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'owner/model' \(revision v1\) is no local folder and could not be fetched"):
        load_backbone(ModelConfig(name="owner/model", revision="v1"), device="cpu")


def test_a_hub_snapshot_is_loaded_at_its_resolved_revision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = checkpoint.rename(tmp_path / commit)
    asked = {}

    def fake_download(repo: str, revision: str, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    record = load_backbone(ModelConfig(name="owner/model", revision="main"), device="cpu").record
    assert (record.name, record.revision) == ("owner/model", commit)
    assert asked["repo"] == "owner/model"
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".bin", ".ckpt", ".py", "*"))]


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
    noise_preds = backbone.denoise(UNetCall(torch.zeros((1, 4, 8, 8)), [501], [prompt.embedding])).noise_preds
    assert noise_preds.dtype == torch.float32


@pytest.mark.parametrize(("prompt", "count"), [("", 0), ("cat", 1), ("cat with sunglasses", 3), ("old man", 3)])
def test_tokens_are_counted_before_padding(prompt: str, count: int) -> None:
    encoded = tiny_sd().encode_text(prompt)
    assert encoded.token_count == count
    assert list(encoded.positions) == list(range(1, 1 + count))
    assert encoded.embedding.shape == (77, 32)


def test_a_prompt_longer_than_the_encoder_is_cut() -> None:
    assert tiny_sd().encode_text("cat " * 200).token_count == 75


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
    watched = [name for name, p in backbone.unet.attn_processors.items() if p.watched]
    assert len(watched) == 5  # SD 1.x: two on the way down, three on the way up


def test_our_attention_equals_the_librarys() -> None:
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel.from_pretrained(TINY_SD, subfolder="unet").eval()
    backbone = tiny_sd()
    prompt = backbone.encode_text("a cat with sunglasses")
    latents = torch.randn((2, 4, 12, 12), generator=torch.Generator().manual_seed(0))
    ours = backbone.denoise(UNetCall(latents, [501, 21], [prompt.embedding] * 2)).noise_preds
    with torch.no_grad():
        embeddings = torch.stack([prompt.embedding] * 2)
        theirs = plain(latents, torch.tensor([501, 21]), encoder_hidden_states=embeddings).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_vae_round_trip_is_deterministic_and_keeps_its_range() -> None:
    backbone = tiny_sd()
    pixels = (torch.rand((64, 96, 3), generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8).numpy()
    latents = backbone.encode_image(pixels)
    assert latents.shape == (4, 8, 12)
    assert torch.equal(latents, backbone.encode_image(pixels))
    decoded = backbone.decode_latents(latents)
    assert (decoded.shape, str(decoded.dtype)) == ((64, 96, 3), "uint8")
