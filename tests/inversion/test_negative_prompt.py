"""Negative-prompt inversion: the source prompt as the unconditional one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.editing.prompt_to_prompt import PromptToPrompt
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.negative_prompt import NegativePromptInversion, slerp
from pipeline.records import EditedLatents, EditRequest, Trajectory
from tests.facts import InversionFacts
from tests.methods import BACKBONES, invert_and_edit, source, tiny_sd

FACTS = InversionFacts(rows=1, guidance=7.5)  # any: both prompts are one
S = 4
SOURCE = "a cat on a mat"
REQUEST = EditRequest(source_prompt=SOURCE, target_prompt="a dog on a mat")
SAME = EditRequest(source_prompt=SOURCE, target_prompt=SOURCE)
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


def result(backbone: Any, inversion: Any, request: EditRequest, scale: float) -> tuple[Trajectory, EditedLatents]:
    editor = PromptToPrompt(guidance_scale=scale)
    given = source(backbone, 1, request.source_prompt)
    generator = invert_and_edit(given, request, inversion, editor, observe=True)
    edited: tuple[Trajectory, EditedLatents] = Engine(backbone, call_size=8).run_one(generator)
    return edited


@every_backbone
def test_the_unconditional_embedding_is_the_source_prompts(backbone: Any) -> None:
    engine = Engine(backbone, call_size=8)
    trajectory = engine.run_one(NegativePromptInversion(num_steps=S).invert(source(backbone, 1, SOURCE)))
    assert all(torch.equal(one.embedding, backbone.encode_text(SOURCE).embedding) for one in trajectory.uncond)
    assert engine.stats.network_rows == S


@every_backbone
def test_an_empty_source_prompt_gives_the_empty_prompts_embedding(backbone: Any) -> None:
    trajectory = Engine(backbone, call_size=8).run_one(
        NegativePromptInversion(num_steps=S).invert(source(backbone, 1, ""))
    )
    assert all(torch.equal(one.embedding, backbone.encode_text("").embedding) for one in trajectory.uncond)


def test_a_target_like_the_source_is_the_same_at_any_guidance() -> None:
    backbone = tiny_sd(torch.float64)
    results = [result(backbone, NegativePromptInversion(num_steps=S), SAME, scale)[1] for scale in (1.0, 3.0, 7.5)]
    for edited in results:
        torch.testing.assert_close(edited.latents, results[0].latents, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(edited.latents, edited.history[-1].source_latents, atol=1e-7, rtol=1e-7)
    others = [result(backbone, NegativePromptInversion(num_steps=S), REQUEST, scale)[1] for scale in (1.0, 3.0)]
    assert (others[0].latents - others[1].latents).abs().max() > 0.1


@pytest.mark.parametrize("request_", [REQUEST, SAME], ids=["edit", "same prompt"])
def test_all_of_the_empty_prompt_is_ddim(request_: EditRequest) -> None:
    backbone = tiny_sd(torch.float64)
    _, interpolated = result(backbone, NegativePromptInversion(num_steps=S, npi_interp=1.0), request_, 3.0)
    _, plain = result(backbone, DDIMInversion(num_steps=S), request_, 3.0)
    torch.testing.assert_close(interpolated.latents, plain.latents, atol=1e-6, rtol=1e-6)


def test_a_pinned_source_stays_on_its_trajectory() -> None:
    inversion = NegativePromptInversion(num_steps=S, pin_source=True)
    trajectory, edited = result(tiny_sd(), inversion, REQUEST, 7.5)
    for record in edited.history:
        assert torch.equal(record.source_latents, trajectory.latents[record.step + 1])


def test_interpolation_turns_at_an_even_pace_and_ends_where_it_should() -> None:
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    for share in (0.0, 0.25, 1.0):
        angle = share * math.pi / 2
        expected = 3 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(one, other, share), expected)
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn((2, 77, 8), generator=generator)
    torch.testing.assert_close(slerp(first, second, 1.0), second)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_interpolation_of_parallel_embeddings_is_linear(factor: float) -> None:
    one = torch.randn((77, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(one, one * factor, 0.25), one * (0.75 + 0.25 * factor))
