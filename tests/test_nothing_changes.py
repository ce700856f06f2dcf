"""An edit that changes nothing returns the image, whatever the row says that it shows: asked of every pair.

On the bundled model and one drawn face: the closed-form model answers too kindly, and a random UNet cannot invert.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from demo_world.scoring import fresh_scenes
from pipeline.editing import EDITORS
from pipeline.engine.backbone import Backbone
from pipeline.engine.engine import Engine
from pipeline.evaluation.metrics import psnr
from pipeline.inversion import INVERSIONS
from pipeline.models.demo.world import draw
from pipeline.models.loading import load_backbone
from pipeline.one_image import Setup, edit_prepared
from pipeline.recipe import Method, ModelConfig
from pipeline.records import Concept, Decoded, EditRequest, Placement, Prepared
from pipeline.samples import Sample
from tests.facts import editor_facts, inversion_facts

SIDE = 32  # pixels
STEPS = 5
SHOWN = "a round yellow face with a smile on a blue background"
TOLERANCE_DB = 3.0
EXACT_DB = 60.0  # above it the difference is rounding

PAIRS = [
    (inversion, editor)
    for inversion in INVERSIONS
    for editor in EDITORS
    if EDITORS[editor].fits(INVERSIONS[inversion])
    and INVERSIONS[inversion].exact != "none"
    and EDITORS[editor].shows_input
]


@cache
def demo() -> Backbone:
    return load_backbone(ModelConfig(name="demo"), device="cpu")


def method(inversion: str, editor: str) -> Method:
    """A pair that guides the edit as the inversion guides its source."""
    inverts, edits = inversion_facts(inversion), editor_facts(editor)
    settings: dict[str, Any] = {**edits.quick, **(edits.unguided if inverts.guidance == 1 else {})}
    sides = {"guidance_scale", "source_guidance_scale"} & EDITORS[editor].model_fields.keys()
    settings |= dict.fromkeys(sides, inverts.guidance)
    return Method(
        inversion=INVERSIONS[inversion](method=inversion, num_steps=STEPS, **inverts.quick, **inverts.guided_by),
        editing=EDITORS[editor](method=editor, **settings),
    )


def results(methods: dict[str, Method], request: EditRequest) -> dict[str, Decoded]:
    """One drawn face, edited by all methods side by side."""
    pixels = draw(fresh_scenes(1, 5)[0], SIDE)
    whole = (SIDE, SIDE)
    prepared = Prepared(
        sample=Sample(id="face", shard="", key="face", index=0, image=b""),
        original=pixels,
        pixels=pixels,
        placement=Placement(original=whole, crop=(0, 0, *whole), scaled=whole, offset=(0, 0), canvas=whole),
        mask=None,
        allowed=None,
        requests={"edit": request},
    )
    made = Engine(demo(), call_size=16, pad=False).run_one(
        edit_prepared(prepared, Setup(methods=methods, run_seed=0), demo())
    )
    assert all(isinstance(result, Decoded) for result in made), made
    return {result.method: result for result in made}


def psnr_of(result: Decoded) -> float:
    """Against the autoencoder's round trip, in dB."""
    return psnr(result.round_trip, result.pixels) or 0.0


@pytest.fixture(scope="module")
def returned() -> dict[str, float]:
    """What each inversion returns under the empty prompt, walked straight back, in dB."""
    walked = {name: method(name, "reconstruct") for name in INVERSIONS if INVERSIONS[name].exact != "none"}
    return {name: psnr_of(result) for name, result in results(walked, EditRequest()).items()}


@pytest.fixture(scope="module")
def unchanged() -> dict[str, float]:
    """What every pair makes of a request that changes nothing, under a source prompt, in dB; all in one edit."""
    request = EditRequest(
        source_prompt=SHOWN, target_prompt=SHOWN, concepts=(Concept(prompt="sunglasses", guidance_scale=0.0),)
    )
    made = results({f"{inversion}-{editor}": method(inversion, editor) for inversion, editor in PAIRS}, request)
    return {name: psnr_of(result) for name, result in made.items()}


@pytest.mark.parametrize(("inversion", "editor"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_an_edit_that_changes_nothing_returns_the_image_under_a_source_prompt_too(
    inversion: str, editor: str, unchanged: dict[str, float], returned: dict[str, float]
) -> None:
    assert unchanged[f"{inversion}-{editor}"] > min(returned[inversion] - TOLERANCE_DB, EXACT_DB)


def test_the_prompt_that_ledits_pp_starts_from_is_what_it_inverts_under() -> None:
    """With a negative prompt, too: nothing but the concepts' regions may change."""
    request = EditRequest(negative_prompt="a green face", concepts=(Concept(prompt="sunglasses", guidance_scale=0.0),))
    (result,) = results({"ledits_pp": method("ddpm", "ledits_pp")}, request).values()
    assert psnr_of(result) > EXACT_DB
