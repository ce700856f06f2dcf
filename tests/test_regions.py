"""What is reported as a result's region, whatever the method: inside the user's mask, and never a black picture."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.editing import EDITORS
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError
from pipeline.flow import edit_row
from pipeline.inversion.ddim import DDIMInversion
from pipeline.reading.prepare import HERE
from pipeline.reading.requests import asked_of
from pipeline.recipe import recipe_from
from pipeline.records import Edited, Outcome, Rejected
from pipeline.samples import Sample
from pipeline.writing.restoring import outcome_of
from tests.facts import editor_facts, inversion_facts
from tests.methods import BACKBONES, SIDE, invert_and_edit, source
from tests.test_every_pair import PAIRS, REQUEST

SHAPE = (83, 110)  # not the model's shape, and no multiple of a latent cell
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    editor: (editor, dict(editor_facts(editor).quick)) for _, editor in PAIRS
}
SETTINGS |= {
    "diffedit": ("diffedit", {"num_maps": 2}),
    "fast_diffedit": ("fast_diffedit", {"num_maps": 2}),
    "masactrl_auto": ("masactrl", {"start_step": 1, "mask": "auto", "thres": 0.5}),
    "masactrl_given": ("masactrl", {"start_step": 1, "mask": "given"}),
    "ledits_pp_noise": ("ledits_pp", {"mask": "noise"}),
    "ledits_pp_attention": ("ledits_pp", {"mask": "attention"}),
}
REFUSES_MASKS = {editor for editor in EDITORS if not EDITORS[editor].keeps_to_masks}
EDITING = [
    editor for editor in dict.fromkeys(editor for _, editor in PAIRS) if editor not in {*REFUSES_MASKS, "reconstruct"}
]
FIND_REGIONS = [editor for editor in EDITING if editor_facts(editor).finds_region]
REPAINT_EVERYTHING = [editor for editor in EDITING if editor not in FIND_REGIONS]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def a_mask(kind: str) -> np.ndarray:
    """A mask whose edges fall into the middle of latent cells."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return {"part": (columns > 2 * rows / 3 + 11) & (columns < 93), "black": np.zeros(SHAPE, dtype=bool)}[kind]


@cache
def outcomes(backbone: str, kind: str | None, fit: str = "pad") -> dict[str, Outcome]:
    """One image by every editor, by name of its settings."""
    inversion = {editor: name for name, editor in PAIRS}
    recipe = recipe_from(
        {
            "source": {"shards": "-"},
            "edits": REQUEST.model_dump(exclude_unset=True),
            "model": {"size": 96, "fit": fit},
            "methods": {
                name: {
                    "inversion": {
                        "method": inversion[editor],
                        "num_steps": 3,
                        **inversion_facts(inversion[editor]).quick,
                    },
                    "editing": {"method": editor, **settings},
                }
                for name, (editor, settings) in SETTINGS.items()
            },
            "sink": {"folder": "-"},
        }
    )
    smooth = np.cumsum(np.random.default_rng(3).normal(size=(*SHAPE, 3)), axis=1)
    pixels = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    mask = None if kind is None else png(a_mask(kind))
    sample = Sample(id="a", shard="", key="a", index=0, image=png(pixels), mask=mask)
    model = BACKBONES[backbone]()
    results = Engine(model, call_size=16).run_one(edit_row(asked_of(sample, recipe), recipe, model, HERE))
    return {result.method: outcome_of(result) for result in results}


@pytest.mark.parametrize(
    ("backbone", "fit"), [("tiny_sd", "pad"), ("analytic", "pad"), ("analytic", "crop"), ("analytic", "stretch")]
)
@pytest.mark.parametrize("kind", ["part", "black"])
@pytest.mark.parametrize("method", [name for name, (editor, _) in SETTINGS.items() if editor not in REFUSES_MASKS])
def test_every_reported_mask_lies_inside_the_users_and_no_mask_is_empty(
    method: str, kind: str, fit: str, backbone: str
) -> None:
    outcome = outcomes(backbone, kind, fit)[method]
    assert isinstance(outcome, Edited), outcome
    reported = [mask for mask in (outcome.mask, *outcome.masks) if mask is not None]
    assert all(mask.any() for mask in reported)
    assert not any((mask & ~a_mask(kind)).any() for mask in reported)
    if outcome.masks and outcome.mask is not None:
        assert np.array_equal(outcome.mask, np.logical_or.reduce([mask for mask in outcome.masks if mask is not None]))


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (method, kind)
        for method, (editor, _) in SETTINGS.items()
        for kind in (None, "part", "black")
        if (kind is None or editor not in REFUSES_MASKS) and EDITORS[editor].shows_input
    ],
)
def test_figures_of_a_background_are_there_where_a_mask_is(method: str, kind: str | None) -> None:
    outcome = outcomes("tiny_sd", kind)[method]
    assert isinstance(outcome, Edited), outcome
    figures = outcome.figures
    assert figures["image_psnr"] is not None
    if outcome.mask is None:
        assert {figures[name] for name in ("background_psnr", "background_ssim", "mask_share")} == {None}
    else:
        assert figures["mask_share"] == pytest.approx(outcome.mask.mean())


@pytest.mark.parametrize("method", REPAINT_EVERYTHING)
def test_a_method_that_finds_no_region_has_the_users_or_none(method: str) -> None:
    for kind, expected in ((None, None), ("part", a_mask("part")), ("black", None)):
        outcome = outcomes("analytic", kind)[method]
        assert isinstance(outcome, Edited)
        assert outcome.masks == (), f"add finds_region=True to FACTS in tests/editing/test_{method}.py"
        if expected is None:
            assert outcome.mask is None
        else:
            np.testing.assert_array_equal(outcome.mask, expected)


@pytest.mark.parametrize("method", FIND_REGIONS)
def test_a_method_that_finds_a_region_reports_that_part_of_it_which_the_user_allows(method: str) -> None:
    outcome = outcomes("tiny_sd", "part")[method]
    assert isinstance(outcome, Edited)
    assert outcome.mask is not None
    assert len(outcome.masks) == 1


def test_nothing_edited_is_no_region_whatever_the_user_allows() -> None:
    for kind in (None, "part", "black"):
        outcome = outcomes("analytic", kind)["reconstruct"]
        assert isinstance(outcome, Edited)
        assert (outcome.mask, outcome.masks) == (None, ())


def test_a_method_that_keeps_to_no_mask_refuses_a_row_that_brings_one_before_it_costs_a_row() -> None:
    outcome = outcomes("analytic", "part")["cfg"]
    assert isinstance(outcome, Rejected)
    assert (outcome.stage, outcome.error_class) == ("prepare", "PrepareError")
    assert "cannot keep to a mask" in outcome.message


@pytest.mark.parametrize("editing", [{"method": "diffedit"}, {"method": "masactrl", "mask": "given", "start_step": 1}])
def test_a_mask_too_thin_for_latents_is_refused_and_never_quietly_no_edit(editing: dict[str, Any]) -> None:
    backbone, editor = BACKBONES["analytic"](), EDITORS[editing["method"]](**editing)
    thin = torch.zeros((SIDE, SIDE))
    thin[3, :] = 0.25
    generator = invert_and_edit(source(backbone, 1), REQUEST, DDIMInversion(num_steps=2), editor, user_mask=thin)
    with pytest.raises(PrepareError, match="too thin"):
        Engine(backbone, call_size=8).run_one(generator)
