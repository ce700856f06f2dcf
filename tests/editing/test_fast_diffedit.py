"""FastDiffEdit: its mask, repainting by a plain and by an inpainting UNet, and what it costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.diffusion.masks import dilated
from pipeline.editing.diffedit import DiffEdit
from pipeline.editing.fast_diffedit import GREY, FastDiffEdit
from pipeline.editor import Editor
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkAnswer, NetworkCall
from pipeline.engine.engine import Engine
from pipeline.engine.pictures import encode_picture
from pipeline.errors import EditError, RecipeError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.looking.counting import RowCounter
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig, recipe_from
from pipeline.records import EditRequest
from tests.facts import EditorFacts
from tests.golden.replay import TINY_SD
from tests.methods import BACKBONES, analytic, image_latents, invert_and_edit, levels, source, tiny_sd

DRAWS = 20
FACTS = EditorFacts(rows=2, rows_once=2 * DRAWS, finds_region=True)
N = 3
DOG = EditRequest(source_prompt="a photo of a cat", target_prompt="a photo of a dog")
INPAINT = {"method": "fast_diffedit", "backend": "inpaint", "num_maps": 2}
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


def sections(inversion: dict[str, Any], editing: dict[str, Any]) -> dict[str, Any]:
    return {"source": {"shards": "-"}, "sink": {"folder": "-"}, "inversion": inversion, "editing": editing}


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The tiny checkpoint with five more input channels, of random weights, on which its predictions depend."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(TINY_SD, tmp_path_factory.mktemp("inpainting") / "model"))
    plain = UNet2DConditionModel.from_pretrained(TINY_SD, subfolder="unet")
    torch.manual_seed(0)
    wide = UNet2DConditionModel.from_config({**plain.config, "in_channels": 9})
    weights = plain.state_dict()
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], wide.conv_in.weight[:, 4:].detach()], dim=1)
    wide.load_state_dict(weights)
    shutil.rmtree(folder / "unet")
    wide.save_pretrained(folder / "unet")
    return load_backbone(ModelConfig(name=str(folder)), device="cpu")


def photograph() -> np.ndarray:
    """Smooth, (96, 96, 3): latents of 12 x 12."""
    ramp = np.linspace(20, 230, 96)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.full((96, 96), 90.0)), axis=-1).astype(
        np.uint8
    )


@pytest.mark.parametrize(
    ("inversion", "editing", "rows"),
    [
        ({"method": "noise", "num_steps": N}, {"method": "fast_diffedit"}, 2 * 20 + 2 * N),
        ({"method": "noise", "num_steps": N}, INPAINT, 2 * 2 + 2 * N),
        ({"method": "ddim", "num_steps": N}, {"method": "fast_diffedit", "num_maps": 4}, N + 2 * 4 + 2 * N),
    ],
)
def test_a_plan_counts_draws_times_texts_and_two_rows_a_step(
    inversion: dict[str, Any], editing: dict[str, Any], rows: int
) -> None:
    assert RowCounter(recipe_from(sections(inversion, editing))).rows({"edit": DOG}) == rows


@every_backbone
def test_its_mask_is_diffedits_dilated(backbone: Any) -> None:
    masks = []
    for editor in (DiffEdit(num_maps=2), FastDiffEdit(num_maps=2)):
        engine = Engine(backbone, call_size=8)
        generator = invert_and_edit(source(backbone, 1, DOG.source_prompt), DOG, DDIMInversion(num_steps=4), editor)
        masks.append(engine.run_one(generator)[1].mask)
    assert torch.equal(masks[1], dilated(masks[0], 1))
    assert masks[1].sum() > masks[0].sum()


@every_backbone
def test_repainting_from_noise_leaves_the_image_outside_of_the_mask(backbone: Any) -> None:
    mask = torch.zeros((12, 12))
    mask[:5] = 1.0
    given, engine = source(backbone, 1, DOG.source_prompt), Engine(backbone, call_size=8)
    generator = invert_and_edit(given, DOG, NoiseStart(num_steps=N), FastDiffEdit(), user_mask=mask)
    _, edited = engine.run_one(generator)
    assert engine.stats.network_rows == 2 * N
    assert torch.equal(edited.latents[:, 5:], image_latents(backbone, 1)[:, 5:])
    assert not torch.equal(edited.latents[:, :5], image_latents(backbone, 1)[:, :5])


def test_an_inpainting_unet_is_given_mask_and_masked_image(
    inpainting: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[NetworkCall] = []
    denoise = inpainting.denoise

    def recording(call: NetworkCall) -> NetworkAnswer:
        calls.append(call)
        return denoise(call)

    monkeypatch.setattr(inpainting, "denoise", recording)
    inversion = {"method": "noise", "num_steps": N}
    result = Editor(inpainting).edit(
        photograph(),
        source_prompt=DOG.source_prompt,
        target_prompt=DOG.target_prompt,
        inversion=inversion,
        editing=INPAINT,
        size=96,
    )
    assert len(calls) == 1 + N
    everything = np.full((96, 96, 3), GREY, dtype=np.uint8)
    of_mask = calls[0].beside["inpaint"]
    assert of_mask.shape == (4, 5, 12, 12)
    assert bool((of_mask[:, 0] == 1).all())
    assert torch.equal(of_mask[0, 1:], encode_picture(inpainting, everything))
    mask = np.asarray(result.mask)
    assert 0 < mask.mean() < 1
    greyed = np.where(mask[..., None], np.uint8(GREY), photograph())
    for call in calls[1:]:
        assert call.beside["inpaint"] is not None
        assert torch.equal(call.beside["inpaint"][0, 0], torch.tensor(mask[::8, ::8], dtype=torch.float32))
        assert torch.equal(call.beside["inpaint"][1, 1:], encode_picture(inpainting, greyed))


def test_the_inpainting_unet_hears_what_it_is_given(inpainting: Backbone) -> None:
    latents, prompt = torch.zeros((1, 4, 12, 12)), inpainting.encode_text("a dog")
    without, given = (
        inpainting.denoise(
            NetworkCall(
                latents, levels(inpainting, [501]), [prompt], beside={"inpaint": torch.full((1, 5, 12, 12), value)}
            )
        )
        for value in (0.0, 1.0)
    )
    plain = tiny_sd().denoise(NetworkCall(latents, levels(inpainting, [501]), [prompt])).predictions.noise
    torch.testing.assert_close(without.predictions.noise, plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given.predictions.noise, plain, atol=1e-2)


def test_checkpoint_and_backend_must_fit(inpainting: Backbone) -> None:
    asked = {"source_prompt": DOG.source_prompt, "target_prompt": DOG.target_prompt, "size": 96}
    noise = {"method": "noise", "num_steps": 2}
    with pytest.raises(RecipeError, match="the model is a plain one"):
        Editor(tiny_sd()).edit(photograph(), inversion=noise, editing=INPAINT, **asked)
    with pytest.raises(RecipeError, match="the model is an inpainting checkpoint"):
        Editor(inpainting).edit(photograph(), inversion=noise, editing={"method": "fast_diffedit"}, **asked)
    with pytest.raises(RecipeError, match=r"'ddim' cannot run on\. Set inversion\.method: noise"):
        recipe_from(sections({"method": "ddim"}, INPAINT))
    without_pixels = source(analytic(), 1)
    generator = invert_and_edit(without_pixels, DOG, NoiseStart(num_steps=2), FastDiffEdit(backend="inpaint"))
    with pytest.raises(EditError, match="reads the image's pixels"):
        Engine(analytic()).run_one(generator)
