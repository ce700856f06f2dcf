"""A model on another device than the methods: what lies on which is never mixed, and little is copied.

The device is torch's meta device, which computes nothing, refuses tensors of others and cannot be read; a copy from it
is answered with small random numbers instead.
"""

from __future__ import annotations

import dataclasses
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig
from tests.checkpoints import change
from tests.golden.replay import TINY_FLUX, TINY_SD, TINY_SD3, TINY_SDXL
from tests.methods import invert_and_edit, network_calls, source
from tests.test_every_pair import PAIRS, REQUEST, method, whole

MODELS = {"tiny_sd": TINY_SD, "tiny_sdxl": TINY_SDXL, "tiny_sd3": TINY_SD3, "tiny_flux": TINY_FLUX}
TEXT_TOKENS = {"tiny_klein": 32, "tiny_qwen_edit": 32}  # of models that are given hundreds of places otherwise


class OtherDevice(TorchDispatchMode):
    """Counts copies to the device, and makes up what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        to = named.get("device")
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and to is not None and to.type == "cpu":
            made = torch.empty(args[0].shape, dtype=named.get("dtype") or args[0].dtype)
            return made.normal_(generator=self.generator).mul_(0.01) if made.is_floating_point() else made.zero_()
        made = func(*args, **named)
        if func is torch.ops.aten._to_copy.default:
            self.copies += made.is_meta and not args[0].is_meta
        elif func is torch.ops.aten.copy_.default:
            self.copies += args[0].is_meta and not args[1].is_meta
        return made


@cache
def on_meta(folder: Path, text_tokens: int | None = None) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder), text_tokens=text_tokens), device="meta")


@pytest.fixture(scope="session")
def tiny_kontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny FLUX under the name of the pipeline that reads a reference image."""
    folder = Path(shutil.copytree(TINY_FLUX, tmp_path_factory.mktemp("kontext") / "model"))
    change(folder / "model_index.json", _class_name="FluxKontextPipeline")
    return folder


@pytest.fixture
def backbone(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """The model of this name; those that are not kept with the tests are made."""
    # The library reads off the device whether a text is padded, once per call of a chat model.
    monkeypatch.setattr("transformers.masking_utils.fast_all", lambda mask: False, raising=False)
    folder = MODELS.get(name) or request.getfixturevalue(name)
    found = on_meta(folder, TEXT_TOKENS.get(name))
    if found.offers.reads_pictures:
        unseen(found, monkeypatch)
    return found


def unseen(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the text encoder answer without a look at pictures, whose sizes the library reads off the device; what it is
    given lies there."""
    encoder = backbone.text.encoder
    forward = encoder.model.forward

    def answered(**told: Any) -> Any:
        if "pixel_values" not in told:
            return forward(**told)
        assert {one.device.type for one in told.values() if isinstance(one, torch.Tensor)} == {"meta"}
        return (torch.zeros((*told["input_ids"].shape, encoder.config.text_config.hidden_size), device="meta"),)

    monkeypatch.setattr(encoder.model, "forward", answered)


# Of the second family one pair for each way that a method treats conditioning and rows.
OF_XL = [
    ("ddpm", "ledits_pp"),
    ("null_text", "prompt_to_prompt"),
    ("negative_prompt", "prox_masactrl"),
    ("noise", "cfg"),
]
# And of flow matching: what the network is told, and values that rows take from each other.
OF_FLOW = [("ddim", "direct_edit"), ("noise", "flow_edit"), ("uni_inv", "uniedit_flow")]
# And what reads the image itself.
BY_INSTRUCTION = ("noise", "instruct")
# Of editors that take a quarter of a minute and more on this device, the inversion that is quickest.
FIRST = {"riemannian": "ddim", "h_edit": "direct", "consistory": "ddim", "prompt_to_prompt": "ddim"}


def _repeats() -> set[tuple[str, str]]:
    """Pairs whose inversion and whose editor are both in others. What an editor reads is a trajectory, wherever it
    comes from: that each works on the device is seen once, and all pairs together before a release."""
    seen: set[str] = set()
    found = set()
    for pair in sorted(PAIRS, key=lambda pair: FIRST.get(pair[1], pair[0]) != pair[0]):
        if pair in OF_XL:
            continue
        if seen.issuperset(pair):
            found.add(pair)
        seen.update(pair)
    return found


REPEATS = _repeats()
CASES = [
    pytest.param(name, pair, id=f"{name}-{'+'.join(pair)}", marks=[pytest.mark.slow] if pair in REPEATS else [])
    for name, pairs in (
        ("tiny_sd", PAIRS),
        ("tiny_sdxl", OF_XL),
        ("tiny_sd3", OF_FLOW),
        ("tiny_flux", OF_FLOW),
        ("tiny_kontext", [BY_INSTRUCTION]),
        ("tiny_klein", [*OF_FLOW, BY_INSTRUCTION]),
        ("tiny_qwen_edit", [*OF_FLOW, BY_INSTRUCTION]),
    )
    for pair in pairs
]


def edit_of(backbone: Backbone, pair: tuple[str, str]) -> Steps[Any]:
    """One image through a pair; always the same image."""
    if pair != BY_INSTRUCTION:
        return whole(backbone, *pair)
    made = method(*pair)
    given = dataclasses.replace(source(backbone, 1), pixels=np.zeros((64, 64, 3), dtype=np.uint8))
    instructed = REQUEST.model_copy(update={"instruction": "put a hat on the cat"})
    return invert_and_edit(given, instructed, made.inversion, made.editing)


@pytest.mark.parametrize(("name", "pair"), CASES)
def test_every_pair_runs_without_a_tensor_on_the_wrong_device(
    name: str, pair: tuple[str, str], backbone: Backbone
) -> None:
    engine = Engine(backbone, call_size=8)
    calls = network_calls(engine)
    with OtherDevice() as device:
        trajectory, edited = engine.run_one(edit_of(engine.backbone, pair))
    assert calls
    assert trajectory.latents.device.type == edited.latents.device.type == "cpu"
    print(f"{name}, {'+'.join(pair)}: {device.copies / len(calls):.1f} copies to the device per call")


def test_copies_to_the_device_do_not_grow_with_rows() -> None:
    counts = {}
    for call_size in (4, 16, 64):
        engine = Engine(on_meta(TINY_SD), call_size=call_size)
        calls = network_calls(engine)
        with OtherDevice() as device:
            engine.run_one(whole(engine.backbone, "ddim", "prompt_to_prompt"))
        counts[call_size] = device.copies
        assert {len(call.levels) for call in calls} <= {call_size}
    assert len(set(counts.values())) == 1, counts


def test_copies_to_the_device_do_not_grow_with_layers(tmp_path: Path) -> None:
    """Prompt-to-Prompt acts in every layer of cross-attention and, by its blend, in what several of them watch."""
    counts = {}
    for layers in (1, 2, 4):
        folder = tmp_path / f"{layers}"
        shutil.copytree(TINY_SD, folder)
        config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        UNet2DConditionModel.from_config({**config, "layers_per_block": layers}).save_pretrained(folder / "unet")
        engine = Engine(load_backbone(ModelConfig(name=str(folder)), device="meta"), call_size=8)
        with OtherDevice() as device:
            engine.run_one(whole(engine.backbone, "ddim", "prompt_to_prompt"))
        counts[layers] = device.copies
        assert len(engine.backbone.offers.openings.layers) == 6 * layers + 4
    assert len(set(counts.values())) == 1, counts
