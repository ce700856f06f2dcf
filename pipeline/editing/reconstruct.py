"""No edit: walk the trajectory back under the inversion's own prediction, and see what returns.

The measure of an inversion, and the identity of a pipeline. Cost: one network row per step (two with a guided source
prompt), of which none is left out although an exact inversion could: walking is the point. Masks: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from pipeline.editing.base import EditingMethod
from pipeline.editing.problems import Problem
from pipeline.editing.walk import Predict, guided, guided_against_brought, no_masks, walk
from pipeline.engine.calls import EncodeText, Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory


class Reconstruct(EditingMethod):
    """Replay a trajectory."""

    takes: ClassVar = frozenset({"source branch", "unconditional prompt"})  # it replays what they return
    paper: ClassVar = "the replay step of any inversion"

    method: Literal["reconstruct"] = "reconstruct"
    """No edit: the trajectory is replayed."""

    @property
    @override
    def guides(self) -> bool:
        return False

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        """Every request will do: what it asks to change is not read."""
        yield from ()

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        if trajectory.source_guidance == 1.0 or trajectory.uncond is None:
            prompt = yield from GuidedPrompt.encode(
                trajectory.source_prompt, trajectory.source_guidance, trajectory.source.negative_prompt
            )
            predict: Predict = guided(trajectory, prompt)
        else:
            (source,) = yield EncodeText((trajectory.source_prompt,))
            predict = guided_against_brought(trajectory, source, trajectory.source_guidance)
        latents = yield from walk(trajectory, 0, predict)
        return EditedLatents(latents=latents, masks=no_masks(latents))
