"""Networks that take turns on the device: who is where when, the same bits, and what a plan says of memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkCall
from pipeline.errors import ModelError
from pipeline.models import placing
from pipeline.models.checkpoint import Configurations
from pipeline.models.families import FAMILIES
from pipeline.models.families.base import components_of
from pipeline.models.loading import load_backbone
from pipeline.models.memory import GIB, Needs, needs_of
from pipeline.models.offload import Turns, take_turns
from pipeline.models.outline import memory_note, outline_of
from pipeline.recipe import ModelConfig
from tests.golden.replay import TINY_FLUX, TINY_SD
from tests.models.families import published

CUDA = torch.device("cuda")
T5_XXL = {
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu", "num_heads": 64, "num_layers": 24,
    "vocab_size": 32128, "is_encoder_decoder": True,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip


class Moving:
    """A network that notes where it goes."""

    def __init__(self, name: str, moves: list[tuple[str, str]]) -> None:
        self.name, self.moves = name, moves

    def to(self, device: torch.device | str) -> Moving:
        self.moves.append((self.name, torch.device(device).type))
        return self

    def enable_group_offload(self, **options: Any) -> None:
        self.moves.append((self.name, f"{options['offload_type']} on {options['onload_device'].type}"))


class Calls:
    """A backbone of which calls alone matter."""

    def __init__(self, moves: list[tuple[str, str]]) -> None:
        names = ("encode_text", "encode_texts", "encode_text_of", "denoise", "product")
        for name in (*names, "encode_images", "decode_latents"):
            setattr(self, name, lambda name=name: moves.append(("call", name)))


def moved(monkeypatch: pytest.MonkeyPatch, *, layers: bool) -> tuple[Any, list[tuple[str, str]]]:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    moves: list[tuple[str, str]] = []
    turns = Turns(CUDA, layers=layers)
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        turns.add(name, Moving(name, moves))
    backbone = Calls(moves)
    if not layers:
        take_turns(backbone, turns)  # type: ignore[arg-type]
        return backbone, moves
    return turns, moves


def test_text_encoders_and_network_are_never_on_the_device_together_and_the_autoencoder_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, moves = moved(monkeypatch, layers=False)
    backbone.encode_texts()
    backbone.encode_text()
    backbone.encode_images()
    backbone.denoise()
    backbone.denoise()
    backbone.encode_text_of()
    backbone.decode_latents()
    backbone.encode_texts()
    there: set[str] = set()
    for name, place in moves:
        if name == "call":
            texts = {"text_encoder", "text_encoder_2"}
            needed = {"denoise": {"transformer"}, "encode_texts": texts, "encode_text_of": texts}
            wanted = needed.get(place, set())
            assert wanted <= there
            continue
        there = there | {name} if place == "cuda" else there - {name}
        assert not {"transformer", "text_encoder_2"} <= there, f"both are on the device after {name} has moved"
    assert moves[0] == ("vae", "cuda")
    assert ("vae", "cpu") not in moves
    assert moves.count(("transformer", "cuda")) == 1, "what is there already stays"
    assert moves[-1] == ("call", "encode_texts")


def test_by_layers_the_network_is_left_to_its_blocks_and_text_leaves_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, moves = moved(monkeypatch, layers=True)
    turns.take("text")
    turns.take("network")
    assert ("transformer", "block_level on cuda") in moves
    assert ("transformer", "cuda") not in moves
    assert moves[-2:] == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]


def test_what_was_loaded_in_8_bit_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    moves: list[tuple[str, str]] = []
    turns, quantized = Turns(CUDA, layers=False), Moving("text_encoder_2", moves)
    quantized.is_quantized = True  # type: ignore[attr-defined]
    turns.add("text_encoder_2", quantized)
    turns.take("text")
    turns.take("network")
    assert not moves


@cache
def answers(model: Path, offload: str) -> list[torch.Tensor]:
    """What a tiny model says to a call of each kind, and again after the others have had their turn."""
    text_tokens = 8 if model == TINY_FLUX else None
    config = ModelConfig(name=str(model), offload=offload, text_tokens=text_tokens)
    backbone: Backbone = load_backbone(config, device="cpu")
    found = []
    for _ in range(2):
        (prompt,) = backbone.encode_texts(["a cat"])
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
        latents = backbone.encode_images(pixels)
        step = backbone.schedule.steps(4, tuple(latents.shape[-2:]))[1]
        answer = backbone.denoise(NetworkCall(latents=latents, levels=[step.start], conditioning=[prompt]))
        found += [prompt.embedding, latents, answer.predictions.data, backbone.decode_latents(latents)]
    return found


@pytest.mark.parametrize("offload", ["components", "layers"])
@pytest.mark.parametrize("model", [TINY_SD, TINY_FLUX], ids=lambda path: path.name)
def test_results_have_the_same_bits(model: Path, offload: str) -> None:
    for one, other in zip(answers(model, "none"), answers(model, offload), strict=True):
        assert torch.equal(one, other)


def test_methods_that_go_back_through_the_network_are_not_offered_where_its_blocks_leave() -> None:
    whole = load_backbone(ModelConfig(name=str(TINY_SD)), device="cpu").offers
    by_layers = load_backbone(ModelConfig(name=str(TINY_SD), offload="layers"), device="cpu").offers
    assert whole.embedding_gradients
    assert whole.bottleneck is not None
    assert not by_layers.embedding_gradients
    assert by_layers.bottleneck is None


def test_a_compiled_network_cannot_be_moved() -> None:
    with pytest.raises(ValidationError, match="keeps its place on the device, and offload components moves it"):
        ModelConfig(compile=True, offload="components")


def test_8_bit_is_refused_without_t5_without_a_gpu_and_without_its_library() -> None:
    with pytest.raises(ModelError, match=r"model\.text_8bit is for T5"):
        load_backbone(ModelConfig(name=str(TINY_SD), text_8bit=True), device="cpu")
    with pytest.raises(ModelError, match="the device is cpu"):
        load_backbone(ModelConfig(name=str(TINY_FLUX), text_8bit=True), device="cpu")


def test_8_bit_takes_its_library_and_hands_the_encoder_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["FluxPipeline"]
    loading: Any = type("Loading", (), {"text_8bit": True, "device": CUDA, "dtype": torch.bfloat16})()
    monkeypatch.setattr(placing, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        placing.refuse_8bit(loading, family.components, "it")
    given: dict[str, Any] = {}
    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", lambda *_, **options: given.update(options))
    checkpoint: Any = type("Checkpoint", (), {"folder": "x", "variant": None})()
    placing.load_8bit(checkpoint, "text_encoder_2", family.components["text_encoder_2"], loading)
    assert given["quantization_config"].load_in_8bit
    assert given["device_map"] == {"": CUDA}


def needs(pipeline: str, files: dict[str, Any], **settings: Any) -> Needs:
    family = FAMILIES[pipeline]
    configurations = Configurations(files.pop("model_index.json"), files)
    components = components_of(family, configurations.index)
    return needs_of(family, configurations, components, **{"size": None, "dtype": torch.bfloat16, **settings})


def test_parameters_are_those_of_the_published_models_and_offload_takes_off_what_it_says() -> None:
    flux = {
        "model_index.json": published.FLUX_INDEX,
        "transformer": published.FLUX_TRANSFORMER,
        "vae": {**published.FLUX_VAE, **VAE},
        "text_encoder": CLIP_L,
        "text_encoder_2": T5_XXL,
    }
    found = needs("FluxPipeline", dict(flux))
    assert found.parts["transformer"] == 2 * 11_901_408_320
    assert found.parts["text_encoder_2"] == 2 * 4_762_310_656
    assert found.under("none") == sum(found.parts.values()) > 31 * GIB
    assert found.under("components") == found.parts["transformer"] + found.parts["vae"] < 23 * GIB
    assert found.under("layers") < 10 * GIB, "text encoders, then blocks"
    in_8_bit = needs("FluxPipeline", dict(flux), text_8bit=True)
    assert in_8_bit.parts["text_encoder_2"] * 2 == found.parts["text_encoder_2"]
    stays = in_8_bit.parts["text_encoder_2"]
    assert in_8_bit.under("components") - found.under("components") == stays, "it does not leave for the network"
    assert stays < in_8_bit.under("layers") < found.under("layers")


def test_parameters_of_flux_2_klein_are_those_of_the_published_model() -> None:
    files = {
        "model_index.json": published.KLEIN_INDEX,
        "transformer": published.KLEIN_TRANSFORMER,
        "vae": published.KLEIN_VAE,
        "text_encoder": published.QWEN3_4B,
    }
    found = needs("Flux2KleinPipeline", files)
    assert found.parts["transformer"] == 2 * 3_875_544_576
    assert found.parts["text_encoder"] == 2 * 4_022_468_096
    assert found.parts["vae"] == 2 * 84_046_115
    assert found.row == 16 * (64 * 64 + 512) * 24 * 128 * 2


def test_an_estimate_grows_with_the_picture_and_the_precision() -> None:
    files = {
        "model_index.json": published.SD_INDEX,
        "unet": published.SD_1_5_UNET,
        "vae": {**published.SD_VAE, **VAE},
        "text_encoder": CLIP_L,
    }
    small = needs("StableDiffusionPipeline", dict(files))
    assert small.parts["unet"] == 2 * 859_520_964
    large = needs("StableDiffusionPipeline", dict(files), size=1024, dtype=torch.float32)
    assert large.row == 2 * 4 * small.row, "four times the pixels, twice the bytes"
    assert large.picture == 2 * 4 * small.picture
    assert large.parts["unet"] == 2 * small.parts["unet"]


def test_a_plan_says_it_of_large_models_alone() -> None:
    assert memory_note(ModelConfig(), outline_of(ModelConfig())) == ""
    made = Needs(parts={"unet": 4 * GIB, "text_encoder": GIB, "vae": GIB // 2}, block=GIB, rest=0, row=GIB, picture=GIB)
    assert made.in_words("components", torch.bfloat16) == (
        "memory: needs about 4.5 GiB on the device for networks in bfloat16 (text_encoder 1.0, unet 4.0, vae 0.5), and "
        "by estimate 1.00 GiB for each row of a call, 1.00 GiB for a picture that is decoded; without offload 5.5 GiB, "
        "model.offload: layers 2.5 GiB"
    )
