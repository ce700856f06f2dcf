"""The loop of every editor with two branches: a source that shows what the image is, and a target that reads from it.

At each step the rows of both branches form one group, so that the target's attention can read the source's; the editor
says how in a `BranchEdit`. Order within a step: predict, guide, move, pin the source, then whatever the editor does
afterwards (it copies source latents into the target, so the source must stand where it belongs).

Cost per step: the target's conditional row and, unless guidance is 1, its unconditional one; the source's rows only as
long as somebody reads them. A pinned source needs no guidance of its own, hence no unconditional row, unless the editor
reads that half's attention too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.diffusion.guidance import classifier_free_guidance
from pipeline.diffusion.levels import Prediction
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import no_place_for_negative_prompt
from pipeline.editing.walk import no_masks, start_of, take_step
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeText, Steps
from pipeline.engine.controls import Control
from pipeline.errors import PrepareError
from pipeline.records import EditedLatents, EditRequest, Trajectory

Branch = Literal["source", "target"]
BRANCHES: tuple[Branch, Branch] = ("source", "target")  # in the order of whatever is stacked for both


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """The prompts of one edit, as the network reads them."""

    source: Conditioning
    source_uncond: tuple[Conditioning, ...]  # N, one per step
    target: Conditioning
    target_uncond: tuple[Conditioning, ...]  # N

    @classmethod
    def encode(cls, trajectory: Trajectory, request: EditRequest) -> Steps[Branches]:
        """Encode the prompts; unconditional embeddings that the inversion brings take the empty prompt's place."""
        source, target, empty, negative = yield EncodeText(
            (trajectory.source_prompt, request.target_prompt, "", request.negative_prompt)
        )
        negatives = (negative,) * trajectory.num_steps
        if trajectory.uncond is None:
            return cls(
                source=source,
                source_uncond=(empty,) * trajectory.num_steps,
                target=target,
                target_uncond=negatives,
            )
        if request.negative_prompt and trajectory.uncond_scope == "all":
            raise PrepareError(no_place_for_negative_prompt(trajectory.method))
        return cls(
            source=source,
            source_uncond=trajectory.uncond,
            target=target,
            target_uncond=trajectory.uncond if trajectory.uncond_scope == "all" else negatives,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchRows:
    """Where the rows of one step stand in their group. Two places may be one row; None: not computed."""

    source: int | None
    source_uncond: int | None
    target: int
    target_uncond: int | None
    count: int  # of different rows


@dataclass(frozen=True, slots=True)
class BranchPrediction:
    """What the model predicted for one branch, (C, h, w) each."""

    cond: Prediction
    uncond: Prediction | None  # None: the same as `cond`, or of no weight

    @property
    def delta(self) -> Prediction:
        """The direction of guidance, conditional minus unconditional."""
        return self.cond - (self.cond if self.uncond is None else self.uncond)

    def guided(self, scale: float) -> Prediction:
        """Classifier-free guidance (arXiv 2207.12598)."""
        if self.uncond is None or scale == 1.0:
            return self.cond
        return classifier_free_guidance(self.uncond, self.cond, scale)


class BranchEdit:
    """One edit of one image: how its target reads its source. As it stands, not at all: plain guided sampling.

    May hold what changes from step to step; steps are asked for in order.
    """

    reads_both_halves = False  # whether the target's unconditional row reads the source's unconditional row

    def __init__(self, trajectory: Trajectory, guidance_scale: float, source_guidance: float | None = None) -> None:
        self.trajectory = trajectory
        self.guidance_scale = guidance_scale
        self.source_guidance = guidance_scale if source_guidance is None else source_guidance

    def reads_attention(self, step: int) -> bool:
        """Whether the target's rows, or a mask, read the source's rows inside the network at this step."""
        return False

    def reads_latents(self, step: int) -> bool:
        """Whether `after_step` reads the source's latents at this step."""
        return False

    def control(self, step: int, rows: BranchRows) -> Control | None:
        """What the rows of this step do to each other."""
        return None

    def guide(
        self, step: int, source: BranchPrediction | None, target: BranchPrediction
    ) -> tuple[Prediction | None, Prediction]:
        """Predictions to move with: the source's, None where its prediction is not needed, and the target's."""
        return None if source is None else source.guided(self.source_guidance), target.guided(self.guidance_scale)

    def move(
        self, step: int, branch: Branch, latents: Tensor, prediction: Prediction, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One step of a branch: (next latents, data prediction)."""
        return take_step(self.trajectory, step, latents, prediction, previous)

    def after_step(
        self, step: int, source: Tensor | None, target: Tensor, seen: Any
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Latents of both branches after the step, and the mask (h, w) bool of what may change, if there is one.

        `source` is None where nothing reads it any more; `seen` is what the control recorded.
        """
        return source, target, None

    def details(self) -> Mapping[str, Tensor]:
        """What else an observer is shown of the step that was just taken."""
        return {}

    def mask(self) -> Tensor | None:
        """(h, w) bool: the mask to report after the last step. None: this edit has none."""
        return None


def two_branch(
    trajectory: Trajectory,
    branches: Branches,
    edit: BranchEdit,
    user_mask: Tensor | None = None,
) -> Steps[EditedLatents]:
    """Walk both branches from the trajectory's start to its end; return the target.

    Args:
        trajectory: what the inversion returned.
        branches: its prompts.
        edit: what happens between the branches.
        user_mask: (h, w) in [0, 1]; outside of it the target follows the source. None: everywhere.
    """
    num_steps = trajectory.num_steps
    tell = observer()
    source: Tensor | None
    target, previous_target = start_of(trajectory, 0)
    source, previous_source = target, previous_target
    reads = [
        step
        for step in range(num_steps)
        if edit.reads_attention(step) or edit.reads_latents(step) or user_mask is not None or tell
    ]
    last_read = reads[-1] if reads else -1
    for step in range(num_steps):
        walks_source = source is not None and not trajectory.keeps_source and step <= last_read
        rows, conditioning, latents = _rows(step, edit, branches, source, target, walks_source)
        control = edit.control(step, rows) if edit.reads_attention(step) else None
        denoised: Denoised = yield Denoise(
            torch.stack(latents), [trajectory.levels[step]] * len(latents), conditioning, control=control
        )
        predictions = denoised.predictions
        of_source = None if rows.source is None else _prediction(predictions, rows.source, rows.source_uncond)
        of_target = _prediction(predictions, rows.target, rows.target_uncond)
        source_pred, target_pred = edit.guide(step, of_source, of_target)
        target, previous_target = edit.move(step, "target", target, target_pred, previous_target)
        if trajectory.keeps_source:
            # Copied, never recomputed: a replayed source drifts away by the rounding of every step.
            source = trajectory.latents[step + 1]
        elif source is not None and source_pred is not None and walks_source:
            source, previous_source = edit.move(step, "source", source, source_pred, previous_source)
            if trajectory.pin_shares is not None:
                source = torch.lerp(source, trajectory.latents[step + 1], trajectory.pin_shares[step])
        else:
            source = None
        source, target, mask = edit.after_step(step, source, target, denoised.seen)
        if user_mask is not None and source is not None:
            target = source + user_mask.to(target) * (target - source)
        if tell:
            masks = no_masks(target) if mask is None else mask[None]
            tell(StepRecord(step=step, latents=target, masks=masks, source_latents=source, details=edit.details()))
    reported = edit.mask()
    return EditedLatents(latents=target, masks=None if reported is None else reported[None])


def _rows(
    step: int, edit: BranchEdit, branches: Branches, source: Tensor | None, target: Tensor, walks_source: bool
) -> tuple[BranchRows, list[Conditioning], list[Tensor]]:
    """The rows of one step, none that nobody reads: (places, prompts, latents)."""
    conditioning: list[Conditioning] = []
    latents: list[Tensor] = []

    def add(prompt: Conditioning, at: Tensor) -> int:
        conditioning.append(prompt)
        latents.append(at)
        return len(latents) - 1

    reads_attention = edit.reads_attention(step)
    source_row, source_uncond_row = None, None
    if source is not None and (reads_attention or walks_source):
        uncond = branches.source_uncond[step]
        guides = walks_source and edit.source_guidance != 1.0
        if uncond is branches.source:
            source_row = source_uncond_row = add(branches.source, source)  # two rows of one input have one answer
        else:
            if guides or (edit.reads_both_halves and reads_attention and edit.guidance_scale != 1.0):
                source_uncond_row = add(uncond, source)
            source_row = add(branches.source, source)
    target_uncond_row = None if edit.guidance_scale == 1.0 else add(branches.target_uncond[step], target)
    target_row = add(branches.target, target)
    rows = BranchRows(
        source=source_row,
        source_uncond=source_uncond_row,
        target=target_row,
        target_uncond=target_uncond_row,
        count=len(latents),
    )
    return rows, conditioning, latents


def _prediction(predictions: Prediction, cond: int, uncond: int | None) -> BranchPrediction:
    return BranchPrediction(predictions[cond], None if uncond is None or uncond == cond else predictions[uncond])
