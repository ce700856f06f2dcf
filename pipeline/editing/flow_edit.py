"""FlowEdit: editing without inversion (Kulikov et al., arXiv 2412.08629, algorithm 1).

The edit is an offset from the image. At each level the image is noised afresh, the edit put at its offset from that,
and the offset moved along the difference of what the two prompts predict there: what both agree on cancels. The last
`n_min` steps may be plain sampling, which gives up structure for the target's style.

Cost: per step `n_avg` rows for the source, which do not wait for each other and serve all edits of an image, and as
many for each target; twice as many where a branch is guided against another prompt. Where nothing is to change, the
image comes back bit for bit. Memory: `n_avg` + 1 latents per step. Stochastic: one seed per image.

FlowAlign (Kim et al., arXiv 2505.23145) is the same with three changes, each a setting: the target is guided away from
the source prompt instead of an empty one, the source is not guided, and the two predictions of the clean latents pull
each other together.

Levels are taken as points of a straight line from image to noise, which those of a variance-preserving model are, too,
once its latents are divided by `Level.scale`. The paper speaks of flow-matching models alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Step
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem, target_problems
from pipeline.editing.walk import no_masks
from pipeline.engine.calls import EncodeText, Fork, Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.inversion.noise import NoiseStart
from pipeline.records import EditedLatents, EditRequest, Trajectory

# The authors' settings: for Stable Diffusion 3 of 50 steps, and for FLUX.1-dev, which is told its guidance, of 28.
GUIDED_SHARE, TOLD_SHARE = 33 / 50, 24 / 28
GUIDED_SCALES, TOLD_SCALES = (3.5, 13.5), (1.5, 5.5)  # of source and target


class FlowEdit(EditingMethod):
    """Move an offset from the image along the difference of two predictions."""

    needs: ClassVar = frozenset({"DDIM steps", "levels alone"})
    paper: ClassVar = "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models, arXiv 2412.08629"
    unguided: ClassVar = "editing.guidance_scale and editing.source_guidance_scale: 1"

    method: Literal["flow_edit"] = "flow_edit"
    """FlowEdit: an offset from the image, moved along the difference of what both prompts predict."""
    n_max: int | None = Field(default=None, ge=1)
    """Steps that are walked, the least noisy ones of the inversion's num_steps: the edit's strength. None: 0.66 of
    them, and 0.86 where the network is told its guidance (FLUX.1-dev), as the authors have it; all of them where
    guided_against is source_prompt, as FlowAlign has it."""
    n_min: int = Field(default=0, ge=0)
    """Of these, the last that are plain sampling under the target prompt; more gives up structure for its style."""
    n_avg: int = Field(default=1, ge=1, le=10)
    """Draws of noise per step, whose predictions are averaged."""
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Guidance of the target prompt, against the edit's negative prompt or told to the network; 1: none. None: 13.5,
    and 5.5 where the network is told."""
    source_guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Guidance of the source prompt, likewise. None: 3.5, and 1.5 where the network is told; 1 where guided_against is
    source_prompt."""
    guided_against: Literal["negative_prompt", "source_prompt"] = "negative_prompt"
    """What the target prompt is guided away from. negative_prompt: the edit's, or what the network is told;
    source_prompt: FlowAlign's, by classifier-free guidance on every model."""
    pull: float = Field(default=0.0, ge=0, lt=1)
    """Weight by which the two predictions of the clean latents are drawn together at each step: FlowAlign's 0.01. More
    keeps more of the image."""

    @property
    @override
    def guides(self) -> bool:
        source = self.source_guidance_scale
        if self.guided_against == "source_prompt" and source is None:
            source = 1.0
        return (self.guidance_scale, source) != (1.0, 1.0)

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)
        if request.negative_prompt and self.guided_against == "source_prompt":
            yield Problem(
                "a negative_prompt",
                "with guided_against: source_prompt flow_edit reads no negative_prompt. Leave it out, or leave "
                "editing.guided_against out",
            )

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        num_steps = inversion.num_steps
        walked = self._count(num_steps, told=False)
        if walked > num_steps:
            yield (
                f"n_max {walked} is more than the {num_steps} steps that there are. Lower editing.n_max or raise "
                "inversion.num_steps"
            )
        if self.n_min >= walked:
            yield (
                f"n_min {self.n_min} leaves none of the {walked} steps that are walked to the edit. Lower "
                "editing.n_min; plain sampling from the noised image is editing.method cfg with a start_step"
            )
        if isinstance(inversion, NoiseStart) and inversion.eta > 0:
            yield (
                f"flow_edit's steps are deterministic and read no noise maps, and inversion.eta is {inversion.eta:g}. "
                "Leave inversion.eta out"
            )

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        source = yield from self._source(trajectory, request.negative_prompt)
        return (yield from self._target(trajectory, request, source, user_mask))

    @override
    def edit_all(
        self, trajectory: Trajectory, requests: Sequence[EditRequest], user_mask: Tensor | None = None
    ) -> Steps[list[EditedLatents | Exception]]:
        """What the source prompt predicts is asked for once."""
        negatives = tuple(dict.fromkeys(request.negative_prompt for request in requests))
        found = yield Fork(tuple(self._source(trajectory, negative) for negative in negatives))
        sources = dict(zip(negatives, found, strict=True))
        edits: list[EditedLatents | Exception] = yield Fork(
            tuple(self._after(trajectory, request, sources[request.negative_prompt], user_mask) for request in requests)
        )
        return edits

    def _after(
        self, trajectory: Trajectory, request: EditRequest, source: NoisedSource | Exception, user_mask: Tensor | None
    ) -> Steps[EditedLatents]:
        if isinstance(source, Exception):
            raise source
        return (yield from self._target(trajectory, request, source, user_mask))

    def _source(self, trajectory: Trajectory, negative_prompt: str) -> Steps[NoisedSource]:
        """The image at every level that the edit walks, and what the source prompt predicts there, in one go.

        Noise is drawn step by step, the noisiest first; and `n_avg` times for each.
        """
        cond, negative = yield EncodeText((trajectory.source_prompt, negative_prompt))
        if negative_prompt and cond.is_told_guidance:
            raise PrepareError(
                "flow_edit tells this network its guidance, in one row, which leaves no place for the edit's "
                "negative_prompt. Leave negative_prompt out, or use editing.method cfg"
            )
        steps = self._walked(trajectory, told=cond.is_told_guidance)
        moved = steps[: len(steps) - self.n_min]
        clean, draw = trajectory.source.latents, trajectory.source.editing_noise()
        noised = torch.stack([step.start.noised(clean, draw()) for step in moved for _ in range(self.n_avg)])
        scale = self.source_guidance_scale
        if scale is None and self.guided_against == "source_prompt":
            prompt = GuidedPrompt(cond, cond, 1.0)
        else:
            scale = (TOLD_SCALES if cond.is_told_guidance else GUIDED_SCALES)[0] if scale is None else scale
            prompt = GuidedPrompt.as_model_guides(cond, negative, scale)
        levels = [step.start for step in moved for _ in range(self.n_avg)]
        velocities = (yield from prompt.predict_all(noised, levels)).velocity
        by_step = (len(moved), self.n_avg, *clean.shape)
        return NoisedSource(
            steps=steps,
            noised=noised.reshape(by_step),
            velocity=velocities.reshape(by_step).mean(dim=1),
            last_noise=draw() if self.n_min else None,
        )

    def _walked(self, trajectory: Trajectory, *, told: bool) -> tuple[Step, ...]:
        """The steps that are walked, noisiest first."""
        return trajectory.solver.steps[trajectory.num_steps - self._count(trajectory.num_steps, told=told) :]

    def _count(self, num_steps: int, *, told: bool) -> int:
        """How many that is, of `num_steps`."""
        if self.n_max is None and self.guided_against == "source_prompt":
            return num_steps
        return self.n_max or steps_walked(num_steps, TOLD_SHARE if told else GUIDED_SHARE)

    def _target(
        self, trajectory: Trajectory, request: EditRequest, source: NoisedSource, user_mask: Tensor | None
    ) -> Steps[EditedLatents]:
        """Move the offset, step by step, then sample the last steps."""
        prompt = yield from self._target_prompt(trajectory, request)
        clean = trajectory.source.latents
        offset = torch.zeros_like(clean)
        first = trajectory.num_steps - len(source.steps)
        for at, (noised, velocity) in enumerate(zip(source.noised, source.velocity, strict=True)):
            start, end = source.steps[at]
            # An offset of zeros leaves the source's own latents: equal prompts then predict equal bits.
            prediction = yield from prompt.predict_all(noised + start.scale * offset, [start] * self.n_avg)
            difference = prediction.velocity.mean(dim=0) - velocity
            # The pull goes along the source's clean latents less the target's: start.share * difference - offset.
            offset = (1.0 - self.pull) * offset + (end.share - start.share + self.pull * start.share) * difference
            if user_mask is not None:
                offset = user_mask * offset
            _tell(first + at, clean + offset)
        latents = clean + offset
        if source.last_noise is not None:
            moved = len(source.noised)
            start = source.steps[moved].start
            latents = start.noised(clean, source.last_noise) + start.scale * offset
            for step in range(first + moved, trajectory.num_steps):
                prediction = yield from prompt.predict(latents, trajectory.levels[step])
                latents = trajectory.solver.transition(step, latents, prediction, None).mean
                if user_mask is not None:
                    end = trajectory.solver.steps[step].end
                    around = clean if step + 1 == trajectory.num_steps else end.noised(clean, source.last_noise)
                    latents = user_mask * latents + (1.0 - user_mask) * around
                _tell(step, latents)
        return EditedLatents(latents=latents, masks=None)

    def _target_prompt(self, trajectory: Trajectory, request: EditRequest) -> Steps[GuidedPrompt]:
        against_source = self.guided_against == "source_prompt"
        away_from = trajectory.source_prompt if against_source else request.negative_prompt
        cond, other = yield EncodeText((request.target_prompt, away_from))
        told = cond.is_told_guidance and not against_source
        scale = (TOLD_SCALES if told else GUIDED_SCALES)[1] if self.guidance_scale is None else self.guidance_scale
        if against_source:
            return GuidedPrompt(cond, other, 1.0 if cond is other else scale)
        return GuidedPrompt.as_model_guides(cond, other, scale)


def steps_walked(num_steps: int, share: float) -> int:
    """A share of the steps, at least one."""
    return max(1, round(num_steps * share))


def _tell(step: int, latents: Tensor) -> None:
    if tell := observer():
        tell(StepRecord(step=step, latents=latents, masks=no_masks(latents)))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedSource:
    """What all edits of an image under one source prompt have in common."""

    steps: tuple[Step, ...]  # that are walked, those of plain sampling included
    noised: Tensor  # (M, n_avg, C, h, w) the image at the level of each step that moves the offset
    velocity: Tensor  # (M, C, h, w) that the source prompt predicts there, mean over draws
    last_noise: Tensor | None  # (C, h, w) of the image where plain sampling begins; None: it never does
