"""No edit: walk the trajectory back under the inversion's own prediction, and see what returns.

The measure of an inversion, and the identity of a pipeline. Cost: one UNet row per step (two with a guided source
prompt), of which none is left out although an exact inversion could: walking is the point. Masks: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor

from pipeline.editing.base import Editor
from pipeline.editing.problems import Problem
from pipeline.editing.walk import Predict, guided_against_brought, no_masks, walk
from pipeline.engine.calls import EncodeText, Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory


class Reconstruct(Editor):
    """Replay a trajectory."""

    paper: ClassVar = "the replay step of any inversion"

    method: Literal["reconstruct"] = "reconstruct"
    """No edit: the trajectory is replayed."""

    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        """See `Editor`: every request will do, what it wants changed is not read."""
        yield from ()

    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        """See `Editor`."""
        if trajectory.source_guidance == 1.0 or trajectory.uncond is None:
            prompt = yield from GuidedPrompt.encode(
                trajectory.source_prompt, trajectory.source_guidance, trajectory.source.negative_prompt
            )
            predict: Predict = prompt.predict
        else:
            (source,) = yield EncodeText((trajectory.source_prompt,))
            predict = guided_against_brought(trajectory, source, trajectory.source_guidance)
        latents = yield from walk(trajectory, 0, predict)
        return EditedLatents(latents=latents, masks=no_masks(latents))
