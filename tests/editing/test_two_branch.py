"""The loop of two branches: what the source is, what is computed, and what a mask keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.editing.cfg import ClassifierFreeGuidance
from pipeline.editing.prompt_to_prompt import PromptToPrompt
from pipeline.editing.reconstruct import Reconstruct
from pipeline.editing.two_branch import BranchEdit, Branches, two_branch
from pipeline.engine.calls import Steps
from pipeline.engine.engine import Engine
from pipeline.errors import PrepareError
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair
from tests.golden.checks import observed
from tests.methods import BACKBONES, SIDE, analytic, invert_and_edit, rows_of_edit, source, tiny_sd

S = 5
SOURCE, TARGET = "a cat on a mat", "a dog on a mat"
REQUEST = EditRequest(source_prompt=SOURCE, target_prompt=TARGET)
SAME = EditRequest(source_prompt=SOURCE, target_prompt=SOURCE)
WITH_BLEND = REQUEST.model_copy(update={"blend_words": WordPair(source=("cat",), target=("dog",))})
ALWAYS = PromptToPrompt(cross_replace_steps=(0, 1), self_replace_steps=(0, 1))
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


def result(
    backbone: Any, request: EditRequest, inversion: Any, editor: Any, **options: Any
) -> tuple[Trajectory, EditedLatents]:
    generator = invert_and_edit(source(backbone, 1, SOURCE), request, inversion, editor, **options)
    edited: tuple[Trajectory, EditedLatents] = Engine(backbone, call_size=8).run_one(generator)
    return edited


@every_backbone
@pytest.mark.parametrize("request_", [REQUEST, SAME, WITH_BLEND], ids=["edit", "same prompt", "blend"])
@pytest.mark.parametrize("scale", [1.0, 7.5, -3.0])
def test_a_pinned_source_is_the_trajectory_bit_for_bit(backbone: Any, request_: EditRequest, scale: float) -> None:
    editor = ALWAYS.model_copy(update={"guidance_scale": scale})
    trajectory, edited = result(backbone, request_, DirectInversion(num_steps=S), editor, observe=True)
    assert len(edited.history) == S
    for record in edited.history:
        assert record.source_latents is not None
        assert torch.equal(record.source_latents, trajectory.latents[record.step + 1])


def plain(guidance_scale: float, trajectory: Trajectory, request: EditRequest) -> Steps[EditedLatents]:
    branches = yield from Branches.encode(trajectory, request)
    return (yield from two_branch(trajectory, branches, BranchEdit(trajectory, guidance_scale)))


@every_backbone
@pytest.mark.parametrize(
    "inversion", [DDIMInversion(num_steps=S), DirectInversion(num_steps=S)], ids=["free", "pinned"]
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_branches_that_do_not_read_each_other_are_plain_guidance_at_its_cost(
    backbone: Any, inversion: Any, scale: float
) -> None:
    trajectory = Engine(backbone, call_size=8).run_one(inversion.invert(source(backbone, 1, SOURCE)))
    guided = Engine(backbone, call_size=8)
    expected = guided.run_one(ClassifierFreeGuidance(guidance_scale=scale).edit(trajectory, REQUEST))
    engine = Engine(backbone, call_size=8)
    edited = engine.run_one(plain(scale, trajectory, REQUEST))
    assert torch.equal(edited.latents, expected.latents)
    assert engine.stats.unet_rows == guided.stats.unet_rows == S * (1 if scale == 1.0 else 2)


@pytest.mark.parametrize(
    ("inversion", "scale", "per_step"),
    [
        (DDIMInversion(num_steps=S), 7.5, 4),
        (DDIMInversion(num_steps=S), 1.0, 2),
        (DirectInversion(num_steps=S), 7.5, 3),
        (DirectInversion(num_steps=S), 1.0, 2),
        (NegativePromptInversion(num_steps=S), 7.5, 3),
        (NegativePromptInversion(num_steps=S, npi_interp=0.5), 7.5, 4),
        (NegativePromptInversion(num_steps=S, npi_interp=0.5, pin_source=True), 7.5, 3),
        (NoiseStart(num_steps=S), 7.5, 4),
    ],
)
def test_no_row_is_computed_that_nobody_reads(inversion: Any, scale: float, per_step: int) -> None:
    editor = ALWAYS.model_copy(update={"guidance_scale": scale})
    assert rows_of_edit(inversion, editor, REQUEST, SOURCE) == S * per_step


@pytest.mark.parametrize(("inversion", "more"), [(DDIMInversion(num_steps=S), 2), (DirectInversion(num_steps=S), 1)])
def test_the_source_ends_with_the_last_step_that_reads_it(inversion: Any, more: int) -> None:
    editor = PromptToPrompt(cross_replace_steps=(0, 0), self_replace_steps=(0, 0.6))
    assert rows_of_edit(inversion, editor, REQUEST, SOURCE) == 2 * S + 3 * more


@every_backbone
def test_looking_at_every_step_changes_no_result(backbone: Any) -> None:
    editor = PromptToPrompt(guidance_scale=2.0)
    seen, unseen = (
        result(backbone, REQUEST, NoiseStart(num_steps=S), editor, observe=observe)[1] for observe in (True, False)
    )
    assert [record.step for record in seen.history] == list(range(S))
    torch.testing.assert_close(seen.latents, unseen.latents, atol=1e-3, rtol=1e-3)


@every_backbone
@pytest.mark.parametrize("scale", [1.0, 2.0, 7.5])
def test_the_source_of_negative_prompt_inversion_is_unguided_sampling_at_any_guidance(
    backbone: Any, scale: float
) -> None:
    inversion = NegativePromptInversion(num_steps=S)
    editor = PromptToPrompt(guidance_scale=scale, cross_replace_steps=(0, 0), self_replace_steps=(0, 0))
    trajectory, edited = result(backbone, REQUEST, inversion, editor, observe=True)
    unguided = Engine(backbone, call_size=8).run_one(observed(Reconstruct().edit(trajectory, EditRequest())))
    for ours, expected in zip(edited.history, unguided.history, strict=True):
        assert ours.source_latents is not None
        assert torch.equal(ours.source_latents, expected.latents)


@pytest.mark.parametrize("inversion", [DDIMInversion(num_steps=S), NegativePromptInversion(num_steps=S)])
def test_equal_prompts_keep_the_branches_equal(inversion: Any) -> None:
    for editor in (ALWAYS, PromptToPrompt(), PromptToPrompt(kind="replace")):
        _, edited = result(tiny_sd(torch.float64), SAME, inversion, editor, observe=True)
        for record in edited.history:
            torch.testing.assert_close(record.latents, record.source_latents, atol=1e-7, rtol=1e-7)


def test_a_pinned_source_does_not_pull_the_target_along() -> None:
    trajectory, edited = result(tiny_sd(), SAME, DirectInversion(num_steps=S), ALWAYS)
    assert (edited.latents - trajectory.latents[-1]).abs().max() > 0.1


@every_backbone
def test_outside_a_users_mask_a_pinned_source_returns_the_image_bit_for_bit(backbone: Any) -> None:
    mask = torch.zeros((SIDE, SIDE))
    mask[:, :5] = 1.0
    trajectory, edited = result(backbone, REQUEST, DirectInversion(num_steps=S), PromptToPrompt(), user_mask=mask)
    image = trajectory.latents[-1]
    assert torch.equal(edited.latents[..., 5:], image[..., 5:])
    assert (edited.latents[..., :5] - image[..., :5]).abs().max() > 1e-3


def test_half_a_mask_is_half_way_between_the_branches() -> None:
    half = torch.full((SIDE, SIDE), 0.5)
    inversion, editor = DirectInversion(num_steps=1), PromptToPrompt()
    trajectory, edited = result(analytic(), REQUEST, inversion, editor, user_mask=half)
    _, free = result(analytic(), REQUEST, inversion, editor)
    torch.testing.assert_close(edited.latents, (trajectory.latents[-1] + free.latents) / 2)


def test_a_negative_prompt_is_refused_where_the_inversion_brings_its_own() -> None:
    request = REQUEST.model_copy(update={"negative_prompt": "snow"})
    with pytest.raises(PrepareError, match="negative_prompt inversion brings an unconditional embedding"):
        result(analytic(), request, NegativePromptInversion(num_steps=S), PromptToPrompt())


def test_embeddings_for_the_source_alone_leave_the_target_to_the_empty_prompt() -> None:
    trajectory = Engine(tiny_sd(), call_size=8).run_one(
        NegativePromptInversion(num_steps=S).invert(source(tiny_sd(), 1, SOURCE))
    )
    alone = dataclasses.replace(trajectory, uncond_scope="source")
    request = REQUEST.model_copy(update={"negative_prompt": "snow"})
    branches = Engine(tiny_sd()).run_one(Branches.encode(alone, request))
    assert torch.equal(branches.source_uncond[0].embedding, branches.source.embedding)
    assert {uncond.prompt for uncond in branches.target_uncond} == {"snow"}
