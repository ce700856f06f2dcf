"""Concepts written place by place: what a template adds, where, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.editing.steering import Places, terms_of
from pipeline.errors import EditError
from pipeline.interventions import Autoencoders, Intervention, Template
from tests.editing.test_concepts import PAIR, UP, WHOLE, autoencoder, blocks, library, made, written

GRID = (2, 3)
BRANCHES: tuple[Literal["cond", "uncond", "both"], ...] = ("cond", "both", "uncond")


def template(*features: int, seed: int = 0) -> Template:
    maps = torch.randn((len(features), *GRID), generator=torch.Generator().manual_seed(seed))
    return Template(features=features, maps=maps)


HAT, BEARD = template(3, 7), template(1, 7, 9, seed=1)


def books(hat: Template | None = HAT) -> Autoencoders:
    return library(hat=dataclasses.replace(WHOLE, template=hat), beard=dataclasses.replace(PAIR, template=BEARD))


def delta(intervention: dict[str, Any], grid: tuple[int, int] = GRID, **places: Any) -> Tensor:
    """What an intervention by templates writes to a block."""
    block = blocks()[UP]
    one = Intervention(form="template", **intervention)
    (target,) = books().targets(one, 500.0, 1000.0)
    return written(terms_of(target, Places(one, None, **places), block, grid), block.channels, grid)


def shown(one: Template) -> Tensor:
    """(C, h', w'): what a template stands for."""
    return torch.einsum("kc,khw->chw", autoencoder(UP).directions[list(one.features)], one.maps)


def test_a_swap_adds_one_template_and_subtracts_the_other_inside_the_region() -> None:
    swap = {"add": ["hat"], "remove": ["beard"], "strength": 1.5}
    expected = 1.5 * (shown(HAT) - shown(BEARD))
    torch.testing.assert_close(delta(swap), expected)
    torch.testing.assert_close(delta({**swap, "strength": -3.0}), -2 * expected)
    left = torch.tensor([1.0, 0.0, 0.0]).expand(GRID)
    box = {**swap, "region": [0.0, 0.0, 1 / 3, 1.0]}
    torch.testing.assert_close(delta(box), expected * left)
    torch.testing.assert_close(delta({"add": ["hat"], "region": box["region"]}), shown(HAT) * left)
    elsewhere = delta({"add": ["hat"], "region": box["region"], "subtract": "elsewhere"})
    torch.testing.assert_close(elsewhere, shown(HAT) * (2 * left - 1))


def test_a_template_lies_over_maps_of_other_sizes() -> None:
    larger = delta({"add": ["hat"]}, (4, 6))
    assert larger.shape[1:] == (4, 6)
    corners = ((0, 0, 0, 0), (3, 5, 1, 2), (3, 0, 1, 0))  # row and column of the larger map, then of its own
    for row, column, own_row, own_column in corners:
        torch.testing.assert_close(larger[:, row, column], shown(HAT)[:, own_row, own_column])


def test_more_features_than_channels_are_written_as_the_same_sum() -> None:
    block, made_with = blocks()[UP], autoencoder(UP)
    every = template(*range(block.channels + 5))
    one = Intervention(form="template", add=("hat",))
    (target,) = books(every).targets(one, 500.0, 1000.0)
    (term,) = terms_of(target, Places(one, None), block, GRID)
    assert len(term.directions) == block.channels < made_with.num_features
    torch.testing.assert_close(written([term], block.channels, GRID), shown(every), rtol=1e-4, atol=1e-4)


def test_a_template_without_strength_is_the_untouched_network_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"form": "template", "add": ["hat"], "remove": ["beard"]}
    plain = made(books=books()).latents
    changed = made({**one, "strength": 2.0}, books=books()).latents
    assert not torch.allclose(changed, plain)
    monkeypatch.setattr(Intervention, "can_matter", True)
    more = {"branch": "both", "region": [0.0, 0.0, 0.5, 0.5], "subtract": "elsewhere"}
    assert torch.equal(made({**one, "strength": 0.0, **more}, books=books()).latents, plain)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"features": {UP: [1]}}, "features by number have no template"),
        ({"add": ["hat"], "relative": True}, "a template has lengths of its own"),
    ],
)
def test_what_no_template_can_say_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Intervention(form="template", **fields)


def test_a_concept_without_a_template_is_named() -> None:
    without = "the concept 'hat' of 'lib' has no template. Run `shardedit sae label` with template_size"
    one = {"form": "template", "add": ["beard"], "remove": ["hat"], "region": [0.0, 0.0, 1.0, 1.0]}
    with pytest.raises(EditError, match=without):
        made(one, books=books(hat=None))
    assert books(hat=None).untemplated(Intervention(**one)) == "hat"
    assert books().untemplated(Intervention(**one)) is None
    assert books(hat=None).untemplated(Intervention(add=("hat",))) is None, "by its direction it can be written"


def test_an_intervention_by_its_direction_is_written_down_as_before_there_were_templates() -> None:
    plain = Intervention(add=("hat",))
    assert "form" not in plain.model_dump(mode="json")
    by_template = Intervention(add=("hat",), form="template")
    assert Intervention(**by_template.model_dump(mode="json")) == by_template


def test_a_row_is_written_with_the_autoencoder_of_its_branch_where_there_is_one() -> None:
    (entry,) = books().entries
    both = Autoencoders((entry, dataclasses.replace(entry, branch="uncond")), "lib")
    used = {branch: both.targets(Intervention(add=("hat",), branch=branch), 500.0, 1000.0) for branch in BRANCHES}
    assert {branch: target.entry.branch for branch, (target,) in used.items()} == {
        "cond": "cond",
        "both": "cond",
        "uncond": "uncond",
    }
    (alone,) = books().targets(Intervention(add=("hat",), branch="uncond"), 500.0, 1000.0)
    assert alone.entry.branch == "cond", "of another one where there is no other"
