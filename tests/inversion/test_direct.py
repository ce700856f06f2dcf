"""Direct inversion: the trajectory of `ddim`, and a source branch that stays on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.editing.prompt_to_prompt import PromptToPrompt
from pipeline.engine.engine import Engine
from pipeline.inversion.ddim import DDIMInversion
from pipeline.inversion.direct import DirectInversion
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair
from tests.facts import InversionFacts
from tests.methods import BACKBONES, invert_and_edit, source, tiny_sd

FACTS = InversionFacts(rows=1)
S = 5
SOURCE = "a cat on a mat"
REQUEST = EditRequest(source_prompt=SOURCE, target_prompt="a dog on a mat")
SAME = EditRequest(source_prompt=SOURCE, target_prompt=SOURCE)
every_backbone = pytest.mark.parametrize("backbone", [make() for make in BACKBONES.values()], ids=list(BACKBONES))


def result(backbone: Any, inversion: Any, request: EditRequest, **settings: Any) -> tuple[Trajectory, EditedLatents]:
    editor = PromptToPrompt(**{"guidance_scale": 2.0, **settings})
    generator = invert_and_edit(source(backbone, 1, SOURCE), request, inversion, editor, observe=True)
    edited: tuple[Trajectory, EditedLatents] = Engine(backbone, call_size=8).run_one(generator)
    return edited


@every_backbone
@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_it_stores_what_ddim_stores_at_the_same_cost(backbone: Any, guidance: float) -> None:
    trajectories, rows = [], []
    for inversion in (DDIMInversion, DirectInversion):
        engine = Engine(backbone, call_size=8)
        settings = inversion(num_steps=S, guidance_scale=guidance)
        trajectories.append(engine.run_one(settings.invert(source(backbone, 1, SOURCE))))
        rows.append(engine.stats.network_rows)
    free, pinned = trajectories
    assert torch.equal(free.latents, pinned.latents)
    assert (free.pinned, pinned.pinned) == (False, True)
    assert rows[0] == rows[1] == S * (2 if guidance == 2.5 else 1)


@every_backbone
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_source_ends_at_the_encoded_image_exactly(backbone: Any, scale: float) -> None:
    trajectory, edited = result(backbone, DirectInversion(num_steps=S), REQUEST, guidance_scale=scale)
    last = edited.history[-1].source_latents
    assert last is not None
    assert torch.equal(last, trajectory.latents[-1])
    assert torch.equal(last, source(backbone, 1, SOURCE).latents)


def test_equal_prompts_return_the_image_only_where_nothing_may_change() -> None:
    free = result(tiny_sd(), DirectInversion(num_steps=S), SAME)[1]
    request = SAME.model_copy(update={"blend_words": WordPair(source=("cat",), target=("cat",))})
    settings = {"blend_threshold": 1.0, "start_blend": 0.0}
    trajectory, held = result(tiny_sd(), DirectInversion(num_steps=S), request, **settings)
    assert (free.latents - trajectory.latents[-1]).abs().max() > 0.1
    for record in held.history:
        assert torch.equal(record.latents, trajectory.latents[record.step + 1])


def test_the_unconditional_row_of_a_pinned_source_is_not_missed() -> None:
    # Both walk a source that is at the same latents; only one of them computes how it would be guided.
    backbone = tiny_sd(torch.float64)
    inversion = DirectInversion(num_steps=1)
    _, pinned = result(backbone, inversion, REQUEST)
    _, free = result(backbone, DDIMInversion(num_steps=1), REQUEST)
    torch.testing.assert_close(pinned.latents, free.latents, atol=1e-9, rtol=1e-9)
