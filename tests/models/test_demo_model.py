"""The shipped weights, and the parts of their training."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer

from demo_world import train as training
from demo_world.aiming import (
    ATTRIBUTES,
    NOTHING,
    aiming_loss,
    attribute_table,
    named_attributes,
    record_attention,
)
from demo_world.objectives import Flow
from demo_world.oracle import read
from demo_world.scoring import complete_caption
from demo_world.train_autoencoder import refine_decoder, standardize_latents, train_vae
from demo_world.train_unet import draw_pool, train_unet
from demo_world.training import PRESETS
from pipeline.diffusion.flow_schedule import FlowSchedule
from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.engine.engine import Engine
from pipeline.inversion.noise import NoiseStart
from pipeline.models.demo.networks import (
    LATENT_SIZE,
    Sizes,
    build_tokenizer,
    build_unet,
    build_vae,
    load_pipeline,
    save_pipeline,
)
from pipeline.models.demo.world import VOCABULARY, Scene
from pipeline.models.loading import BUNDLED, load_backbone
from pipeline.recipe import ModelConfig
from pipeline.records import EditRequest
from tests.methods import invert_and_edit, source

WEIGHTS = Path(__file__).parents[2] / "pipeline" / "models" / "demo" / "weights"
TINY = Sizes(vae_channels=(8, 8, 8), unet_channels=(8, 8, 16), unet_heads=1, text_width=16, text_layers=1)


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline(WEIGHTS)


@pytest.mark.parametrize("folder", BUNDLED.values(), ids=list(BUNDLED))
def test_the_shipped_weights_are_small_and_safe(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}


def test_loading_the_pipeline_asks_for_no_library_that_is_not_needed() -> None:
    command = "import sys; from pipeline.models.demo.networks import load_pipeline; load_pipeline(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", command, str(WEIGHTS)], capture_output=True, text=True, check=True
    )
    assert "torchvision" not in done.stderr


def test_a_model_that_was_trained_on_is_saved_like_a_fresh_one(shipped, tmp_path: Path) -> None:
    shipped.tokenizer(["a face"], padding="max_length")
    save_pipeline(
        tmp_path,
        copy.deepcopy(shipped.vae),
        copy.deepcopy(shipped.text_encoder),
        shipped.tokenizer,
        copy.deepcopy(shipped.unet),
    )
    for folder in (WEIGHTS, tmp_path):
        configs = [path.read_text() for path in folder.glob("*/config.json")]
        assert len(configs) == 3
        assert not [text for text in configs if "_name_or_path" in text]  # a folder of the machine that trained it
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        saved, given = (json.loads((folder / "tokenizer" / name).read_text()) for folder in (tmp_path, WEIGHTS))
        assert saved == given, name


def test_each_word_of_the_captions_is_one_token(shipped) -> None:
    for word in VOCABULARY:
        assert len(shipped.tokenizer(word).input_ids) == 3, word  # start, word, end


def test_unknown_words_are_spelled_out(shipped) -> None:
    ids = shipped.tokenizer("a Zebra, naïve!").input_ids
    assert shipped.tokenizer.unk_token_id not in ids[1:-1]


def test_text_is_attended_to_at_a_quarter_of_the_latents_side_on_the_way_down_and_up(shipped) -> None:
    grids: dict[str, set[int]] = {}

    def note(name: str):
        return lambda module, args, kwargs, output: grids.setdefault(name, set()).add(args[0].shape[1])

    handles = [
        module.register_forward_hook(note(name.split("_")[0]), with_kwargs=True)
        for name, module in shipped.unet.named_modules()
        if name.endswith("attn2")
    ]
    latents = torch.zeros(1, 4, LATENT_SIZE, LATENT_SIZE)
    text = torch.zeros(1, 77, shipped.unet.config.cross_attention_dim)
    with torch.no_grad():
        shipped.unet(latents, 500, encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    quarter = (LATENT_SIZE // 4) ** 2
    assert quarter in grids["down"] & grids["up"]
    assert len(grids["down"]) >= 2


def test_a_caption_becomes_an_image(shipped) -> None:
    image = shipped("a yellow face with a red hat", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert np.isfinite(image).all()


def test_captions_become_the_faces_that_they_name_by_the_flow_model() -> None:
    wanted = [
        Scene(background="lavender", face_color="yellow", hat="red", beard=True),
        Scene(background="navy", face_color="pink", sunglasses=True, mouth="open"),
    ]
    backbone = load_backbone(ModelConfig(name="demo_flow"), device="cpu")
    assert isinstance(backbone.schedule, FlowSchedule)
    engine = Engine(backbone, call_size=4)
    found = []
    for number, scene in enumerate(wanted):
        request = EditRequest(target_prompt=complete_caption(scene, np.random.default_rng(number)))
        given = source(backbone, number, side=LATENT_SIZE)
        steps = invert_and_edit(given, request, NoiseStart(num_steps=10), ClassifierFreeGuidance(guidance_scale=4.0))
        _, made = engine.run_one(steps)
        pixels = read(np.asarray(backbone.decode_latents(made.latents[None])[0]))
        found += [pixels[name] == value for name, value in scene.attributes().items() if value]
    assert np.mean(found) >= 0.9


def test_both_models_have_one_autoencoder() -> None:
    """So that what an edit loses beside it is the same."""
    one, other = (folder / "vae" / "diffusion_pytorch_model.safetensors" for folder in BUNDLED.values())
    assert one.read_bytes() == other.read_bytes()


def test_recorded_attention_predicts_what_diffusers_own_attention_predicts() -> None:
    torch.manual_seed(0)
    unet = build_unet(TINY).eval()
    latents, text = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 16)
    with torch.no_grad():
        expected = unet(latents, 10, encoder_hidden_states=text).sample
        recorder = record_attention(unet)
        actual = unet(latents, 10, encoder_hidden_states=text).sample
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    maps = recorder.take()
    assert {tuple(one.shape) for one in maps} == {(2, 256, 77), (2, 64, 77)}
    assert recorder.take() == []


def test_articles_and_adjectives_name_what_their_noun_names() -> None:
    tokenizer = build_tokenizer(VOCABULARY)
    articles = torch.tensor(tokenizer.convert_tokens_to_ids(["a</w>", "an</w>"]))
    ids = tokenizer("an oval face with a red hat", return_tensors="pt").input_ids
    named = named_attributes(ids, attribute_table(tokenizer), articles)[0, 1:-1].tolist()
    names = [None if index == NOTHING else ATTRIBUTES[index] for index in named]
    assert names == ["face_shape", "face_shape", "face_color", None, "hat", "hat", "hat"]


def test_attention_on_its_object_costs_nothing_and_beside_it_much() -> None:
    coverage = torch.zeros(1, len(ATTRIBUTES), 16, 16)
    hat = ATTRIBUTES.index("hat")
    coverage[0, hat, :8] = 1
    named = torch.tensor([[NOTHING, hat]])
    inside, outside = torch.zeros(1, 64, 2), torch.zeros(1, 64, 2)
    inside[:, :32], outside[:, 32:] = 0.5, 0.5
    assert aiming_loss([inside], coverage, named).item() < 1e-3 < 5 < aiming_loss([outside], coverage, named).item()


def test_standardized_latents_decode_to_the_same_images() -> None:
    torch.manual_seed(0)
    vae = build_vae(TINY).eval().requires_grad_(False)
    pixels = torch.rand(4, 3, 128, 128) * 2 - 1
    before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    deviation = vae.encode(pixels).latent_dist.logvar
    standardize_latents(vae, np.random.default_rng(0), torch.device("cpu"), count=16)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(vae.decode(posterior.mean).sample, before, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(posterior.logvar, deviation)


def test_training_goes_from_nothing_to_a_model_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    plan = dataclasses.replace(
        PRESETS["cpu"], minutes=0.03, vae_share=0.3, decoder_share=0.3, vae_batch=2, pool=4, batch=2, sizes=TINY
    )
    device = torch.device("cpu")

    def train(minutes: float) -> int:
        longer = dataclasses.replace(plan, minutes=minutes)
        vae = train_vae(longer, tmp_path / "vae.pt", device, seed=0)
        refine_decoder(longer, vae, tmp_path / "decoder.pt", device, seed=0)
        pool = draw_pool(longer, vae, tmp_path / "pool.pt", device, seed=0)
        train_unet(longer, vae, pool, tmp_path, device, seed=0)
        return int(torch.load(tmp_path / "unet.pt", weights_only=True)["clock"]["steps"])

    first = train(0.03)
    encoder = torch.load(tmp_path / "vae.pt", weights_only=True)["vae"]["encoder.conv_in.weight"]
    # Minutes are the clock's: a step that the machine was slow with may have used up those of the next start, too.
    later = next((steps for minutes in (0.06, 0.12, 0.25, 0.5, 1.0) if (steps := train(minutes)) > first), first)
    assert later > first >= 1
    assert torch.equal(torch.load(tmp_path / "vae.pt", weights_only=True)["vae"]["encoder.conv_in.weight"], encoder)
    assert load_pipeline(tmp_path / "weights").vae.config.scaling_factor == 1.0
    assert "steps of 2" in (tmp_path / "weights" / "README.md").read_text()


def test_training_for_flow_goes_on_from_a_model_and_says_in_the_new_one_what_it_was_for(
    shipped, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PRESETS["onward"], minutes=0.01, pool=4, batch=2)
    vae = shipped.vae.eval().requires_grad_(False)
    pool = draw_pool(plan, vae, tmp_path / "pool.pt", torch.device("cpu"), seed=0)
    start: Any = SimpleNamespace(
        unet=copy.deepcopy(shipped.unet),
        text_encoder=copy.deepcopy(shipped.text_encoder),
        tokenizer=shipped.tokenizer,
    )
    train_unet(plan, vae, pool, tmp_path, torch.device("cpu"), 0, start, Flow())
    scheduler = json.loads((tmp_path / "weights" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "flow_prediction"
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "velocity at logit-normal levels" in card
    assert "from a demo model" in card
    assert isinstance(load_backbone(ModelConfig(name=str(tmp_path / "weights")), device="cpu").schedule, FlowSchedule)


def test_an_objective_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"'speed' is unknown\. Choose one of: noise, flow"):
        training.main(tmp_path / "out", objective="speed")
