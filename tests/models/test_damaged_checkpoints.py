"""Checkpoints that are not whole, or whose parts do not fit each other: refused at load, by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.models.loading import DEMO_FOLDER, load_backbone
from pipeline.recipe import ModelConfig
from tests.checkpoints import change, refused
from tests.methods import tiny_sd

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
every_network = pytest.mark.parametrize("network", WEIGHTS)


def rewrite(folder: Path, network: str, work: Callable[[dict[str, Tensor]], Any]) -> str:
    """Change the tensors of a network, and return the name of one that stood there."""
    file = folder / network / WEIGHTS[network]
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.endswith("weight") and tensors[key].ndim > 1)
    work(tensors)
    save_file(tensors, file, {"format": "pt"})
    return name


@every_network
def test_a_missing_tensor_is_named(checkpoint: Path, network: str, capfd: pytest.CaptureFixture[str]) -> None:
    name = rewrite(checkpoint, network, lambda tensors: tensors.pop(sorted_weights(tensors)[0]))
    refused(checkpoint, rf"the weights in {network}/ of the checkpoint lack .*{name.removeprefix('text_model.')}")
    assert capfd.readouterr().err == ""  # the libraries would tell of new random numbers


@every_network
def test_a_tensor_that_the_network_has_not_is_named(checkpoint: Path, network: str) -> None:
    rewrite(checkpoint, network, lambda tensors: tensors.update(stray=torch.zeros(3)))
    refused(checkpoint, rf"the weights in {network}/ of the checkpoint have, but the configuration has no stray")


@every_network
def test_a_misshapen_tensor_is_named(checkpoint: Path, network: str) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = sorted_weights(tensors)[0]
        tensors[name] = tensors[name][:-1].contiguous()

    rewrite(checkpoint, network, cut)
    refused(checkpoint, rf"{network}/ of the checkpoint")


@every_network
def test_weights_that_are_not_finite_are_named(checkpoint: Path, network: str) -> None:
    rewrite(checkpoint, network, lambda tensors: tensors[sorted_weights(tensors)[0]].view(-1)[0].fill_(float("inf")))
    refused(checkpoint, rf"the weights in {network}/ of the checkpoint hold values that are not finite")


def sorted_weights(tensors: dict[str, Tensor]) -> list[str]:
    return [key for key in sorted(tensors) if key.endswith("weight") and tensors[key].ndim > 1]


@every_network
def test_cut_weights_name_their_file(checkpoint: Path, network: str) -> None:
    file = checkpoint / network / WEIGHTS[network]
    file.write_bytes(file.read_bytes()[:-100])
    refused(checkpoint, rf"{network}/{WEIGHTS[network]} of the checkpoint is damaged or cut")
    file.write_bytes(b"")
    refused(checkpoint, rf"{network}/{WEIGHTS[network]} of the checkpoint is damaged or cut")


@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json"]
)
def test_a_missing_or_broken_configuration_names_its_file(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("{")
    refused(checkpoint, rf"{name} of the checkpoint cannot be read")
    (checkpoint / name).write_text("[]")
    refused(checkpoint, rf"{name} of the checkpoint holds no object but a list")
    (checkpoint / name).unlink()
    refused(checkpoint, rf"has no {name}")


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("unet/config.json", {"block_out_channels": "many"}, "unet/ of the checkpoint cannot be loaded"),
        ("unet/config.json", {"sample_size": "64"}, "'64' as unet: sample_size"),
        ("unet/config.json", {"cross_attention_dim": None}, "unet/ of the checkpoint|embeddings of None"),
        ("vae/config.json", {"latent_channels": "4"}, "vae/ of the checkpoint cannot be loaded"),
        ("vae/config.json", {"scaling_factor": None}, "None as vae: scaling_factor"),
        ("text_encoder/config.json", {"hidden_size": [32]}, "text_encoder/ of the checkpoint cannot be loaded"),
        ("scheduler/scheduler_config.json", {"beta_end": "0.012"}, "beta_end '0.012'"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 1000}, "prompts up to 1000 tokens"),
    ],
)
def test_a_wrong_type_or_value_in_a_configuration_is_named(
    checkpoint: Path, name: str, values: dict[str, Any], reason: str
) -> None:
    change(checkpoint / name, **values)
    refused(checkpoint, reason)


def test_a_text_encoder_of_another_width_is_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "text_encoder")
    shutil.copytree(DEMO_FOLDER / "text_encoder", checkpoint / "text_encoder")
    refused(checkpoint, "reads embeddings of 32 numbers, and a text encoder that makes them of 128")


def test_the_tokenizer_of_another_model_is_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "tokenizer")
    shutil.copytree(DEMO_FOLDER / "tokenizer", checkpoint / "tokenizer")
    refused(checkpoint, "a tokenizer of 630 tokens and a text encoder of 711: they were not made for each other")


def test_an_empty_or_missing_tokenizer_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"].update(vocab={}, merges=[])
    content["added_tokens"] = []
    path.write_text(json.dumps(content))
    refused(checkpoint, "tokenizer")
    path.write_text("{}")
    refused(checkpoint, "tokenizer/ of the checkpoint cannot be loaded")
    path.unlink()
    refused(checkpoint, r"has no tokenizer: neither tokenizer/tokenizer\.json nor tokenizer/vocab\.json")


def test_shards_load_like_one_file_and_a_missing_one_is_named(checkpoint: Path) -> None:
    folder = checkpoint / "unet"
    unet = UNet2DConditionModel.from_pretrained(folder)
    (folder / WEIGHTS["unet"]).unlink()
    unet.save_pretrained(folder, max_shard_size="2MB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    backbone: Any = load_backbone(ModelConfig(name=str(checkpoint)), device="cpu")
    expected: Any = tiny_sd()
    for key, tensor in backbone.unet.state_dict().items():
        assert torch.equal(tensor, expected.unet.state_dict()[key])
    digest = backbone.record.digest
    shutil.copy(folder / shards[0].name, folder / "diffusion_pytorch_model-00009-of-00009.safetensors")  # nobody's
    assert load_backbone(ModelConfig(name=str(checkpoint)), device="cpu").record.digest == digest
    shards[-1].unlink()
    refused(checkpoint, rf"index.json of the checkpoint names unet/{shards[-1].name}, which is not there")


def test_weights_as_older_libraries_wrote_them_load(checkpoint: Path) -> None:
    """Stable Diffusion 1.x: the VAE's attention under its first names, the text encoder's positions as a tensor."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def first_names(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            tensor = tensors.pop(name)
            for new, first in old.items():
                name = name.replace(f".{new}.", f".{first}.")
            tensors[name] = tensor

    rewrite(checkpoint, "vae", first_names)
    positions = torch.arange(77)[None]
    rewrite(
        checkpoint, "text_encoder", lambda tensors: tensors.update({"text_model.embeddings.position_ids": positions})
    )
    backbone: Any = load_backbone(ModelConfig(name=str(checkpoint)), device="cpu")
    expected: Any = tiny_sd()
    assert torch.equal(backbone.encode_text("a cat").embedding, expected.encode_text("a cat").embedding)
    for key, tensor in backbone.autoencoder.vae.state_dict().items():
        assert torch.equal(tensor, expected.autoencoder.vae.state_dict()[key])


def test_the_side_of_models_of_the_first_days_is_corrected_as_diffusers_pipelines_do(checkpoint: Path) -> None:
    change(checkpoint / "unet" / "config.json", sample_size=32, _diffusers_version="0.6.0")
    assert load_backbone(ModelConfig(name=str(checkpoint)), device="cpu").image_size == 512
    change(checkpoint / "unet" / "config.json", _diffusers_version="0.42.1")
    assert load_backbone(ModelConfig(name=str(checkpoint)), device="cpu").image_size == 256


@pytest.mark.timeout(30)  # a pipe that nobody writes to is waited for, for ever
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "notes.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/added_tokens.json",
        "tokenizer/chat_template.jinja",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_a_named_pipe_among_its_files_is_named(checkpoint: Path, name: str) -> None:
    file = checkpoint / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    refused(checkpoint, rf"has {file.parent.name}/{file.name}, which is a named pipe, a socket or a device, no file")
