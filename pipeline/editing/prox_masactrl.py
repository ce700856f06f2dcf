"""ProxMasaCtrl (Han et al., arXiv 2306.05414, section 3.3): MasaCtrl under proximal guidance of the target alone.

After `negative_prompt` the source is predicted under its own prompt and never guided; the target is guided away from
the inversion's embedding, by a direction without its small entries.

Cost: the rows of `two_branch`, 3 per controlled step after `negative_prompt`. Masks: the user's, else none. Memory:
nothing is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Prediction
from pipeline.editing.masactrl import Keys, MutualEdit, MutualSelfAttention
from pipeline.editing.proxedit import Prox, direction_problem, threshold_of, thresholded
from pipeline.editing.two_branch import Branches, BranchPrediction, two_branch
from pipeline.engine.calls import EncodeText, Steps
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory

NATIVE_INVERSION = "negative_prompt"


class ProxMasaCtrl(MutualSelfAttention):
    """Change what the image's subject does, with less damage to what it does not touch."""

    needs: ClassVar = frozenset({"faithful source"})
    paper: ClassVar = "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance, arXiv 2306.05414"

    method: Literal["prox_masactrl"] = "prox_masactrl"
    """MasaCtrl under proximal guidance (ProxEdit)."""
    prox: Prox = "soft"
    """How small entries of a direction are dropped. soft: every entry shrinks by the threshold; hard: those up to it
    are dropped; none: all are kept; l1_compat: a double shrinking that turns the sign of some, for parity only. l0 and
    l1 are the published code's names for soft and l1_compat."""
    quantile: float = Field(default=0.7, ge=-100, le=1)
    """Share of the target's direction that the threshold lies above; up to 0 it is the threshold itself, negated."""
    prox_step: int = Field(default=0, ge=0)
    """First step whose direction is thresholded, from 0."""
    inject_uncond: Literal["src", "joint", "none"] = "src"
    """Whose keys and values the unconditional half of guidance reads: the source's, both branches' side by side
    (joint), or its own (none)."""
    inject_cond: Literal["src", "joint", "none"] = "src"
    """Whose keys and values the conditional half of guidance reads: the source's, both branches' side by side (joint),
    or its own (none)."""
    npi_step: int = Field(default=0, ge=0)
    """Steps at the start whose unconditional prompt is the empty one."""

    @model_validator(mode="after")
    def _has_direction(self) -> ProxMasaCtrl:
        if problem := direction_problem(self.prox, self.guidance_scale):
            raise ValueError(problem)
        return self

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if self.npi_step > 0 and inversion.method != NATIVE_INVERSION:
            yield (
                f"npi_step is {self.npi_step}, but inversion.method '{inversion.method}' brings no unconditional "
                f"embedding to begin later with. Set npi_step to 0, or inversion.method to {NATIVE_INVERSION}"
            )
        if self.prox != "none" and self.prox_step >= inversion.num_steps:
            yield (
                f"prox_step {self.prox_step} leaves none of the {inversion.num_steps} steps to threshold. Lower "
                "editing.prox_step, or set prox: none"
            )
        yield from super().pair_problems(inversion)

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        branches = yield from Branches.encode(trajectory, request)
        if trajectory.uncond is not None:
            # The source takes its own prompt in both halves, however the target's embedding is interpolated.
            (empty,) = yield EncodeText(("",))
            num_steps = trajectory.num_steps
            first = min(self.npi_step, num_steps)
            branches = dataclasses.replace(
                branches,
                source_uncond=(empty,) * first + (branches.source,) * (num_steps - first),
                target_uncond=(empty,) * first + branches.target_uncond[first:],
            )
        edit = ProxMasaCtrlEdit(self, trajectory)
        return (yield from two_branch(trajectory, branches, edit, user_mask))


KEYS: dict[str, Keys] = {"src": "source", "joint": "union", "none": "own"}


class ProxMasaCtrlEdit(MutualEdit):
    """One edit of one image."""

    def __init__(self, settings: ProxMasaCtrl, trajectory: Trajectory) -> None:
        super().__init__(
            settings,
            trajectory,
            cond=KEYS[settings.inject_cond],
            uncond=KEYS[settings.inject_uncond],
            source_guidance=1.0,
        )
        self.proximal_settings = settings

    @override
    def guide(
        self, step: int, source: BranchPrediction | None, target: BranchPrediction
    ) -> tuple[Prediction | None, Prediction]:
        """Proximal guidance of the target."""
        settings, level = self.proximal_settings, self.trajectory.levels[step]
        if settings.prox == "none" or step < settings.prox_step or target.uncond is None or level.signal == 0.0:
            return super().guide(step, source, target)
        threshold = threshold_of(target.delta.noise[None], settings.quantile, self.trajectory.source.of_image)
        delta = thresholded(target.delta, threshold, settings.prox)
        return None if source is None else source.cond, target.uncond + self.guidance_scale * delta
