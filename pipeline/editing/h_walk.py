"""The walk of h-Edit (arXiv 2503.02187): at each step a base point, then moves along text directions and rewards.

All that is asked of the model in one evaluation are weighted sums of the predictions under a few prompts. Prompts are
told by identity, so that a row that two sums need is asked for once, and one that no sum needs is not asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.h_transform import at_level, combined, edit_move, reconstruction_pull, rms
from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.masks import above_otsu, dilated, smooth_attention, strongest_region
from pipeline.diffusion.steps import Step
from pipeline.editing.h_control import TargetAttention
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.walk import no_masks, take_step
from pipeline.engine.calls import Conditioning, DecodeGradient, Denoise, Denoised, Steps, Valued
from pipeline.engine.controls import Seen
from pipeline.records import EditedLatents, Trajectory
from pipeline.rewards import Reward, RewardSample

if TYPE_CHECKING:
    from pipeline.editing.h_edit import HEdit


class RowKey(NamedTuple):
    """A row of an evaluation."""

    prompt: Conditioning
    target: int | None = None  # number of the text whose attention is replaced; None: nothing is


Mixture = Mapping[RowKey, float]
"""Weights of rows in a sum; none is zero."""


def mixed(*terms: tuple[Mixture, float]) -> Mixture:
    """A weighted sum of sums. Rows whose weights cancel drop out."""
    total: dict[RowKey, float] = {}
    for mixture, factor in terms:
        for key, weight in mixture.items():
            total[key] = total.get(key, 0.0) + factor * weight
    return {key: weight for key, weight in total.items() if weight != 0.0}


def guided_by(prompt: RowKey, uncond: RowKey, scale: float) -> Mixture:
    """Classifier-free guidance (arXiv 2207.12598) as a sum of rows."""
    return mixed(({prompt: 1.0}, scale), ({uncond: 1.0}, 1.0 - scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One text of the product of experts, encoded."""

    prompt: Conditioning
    weight: float
    guidance_scale: float
    threshold: float  # of a mask by quantile


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """One reward and what it may know."""

    reward: Reward
    sample: RewardSample
    region: Tensor | None = None  # (h, w) bool: where it may act; None: everywhere

    def value_and_grad(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of pixels (3, H, W), and its gradient there."""
        return self.reward.value_and_grad(pixels, self.sample)

    def acts(self, step: int, num_steps: int) -> bool:
        """Whether it moves anything at a step."""
        start, stop = (int(share * num_steps) for share in self.reward.steps)
        return self.reward.weight != 0.0 and start <= step < stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the rows of an edit are told."""

    source: Conditioning
    empty: Conditioning  # what the source is guided against in the inversion
    negative: Conditioning  # what source and targets are guided against in the direction
    texts: tuple[Text, ...]


class Evaluation(NamedTuple):
    """What the model said of one latent."""

    sums: list[Prediction]  # (C, h, w), in the order that they were asked for
    seen: Seen | None


def clean(noise: Tensor, level: Level, latents: Tensor) -> Tensor:
    """What latents at a level are without their predicted noise, all (C, h, w)."""
    return (latents - level.noise * noise) / level.signal


class State(NamedTuple):
    """An edit between two steps."""

    latents: Tensor  # (C, h, w)
    data_pred: Tensor | None  # of the step before, for multistep solvers


@dataclass(slots=True, kw_only=True)
class HWalk:
    """One edit of one image. `begin`, then `take` for each step in order."""

    settings: HEdit
    trajectory: Trajectory
    prompts: Prompts
    climbs: tuple[Climb, ...] = ()
    attention: TargetAttention | None = None  # None: no attention is replaced
    user_mask: Tensor | None = None  # (h, w) in [0, 1]: outside of it the source stays
    strengths: Tensor | None = None  # (K, h, w): sums over steps of how much each text changes the image
    residuals: Tensor | None = None  # (N, C, h, w) of a deterministic trajectory
    masks: Tensor | None = field(default=None)  # (K or 1, h, w) bool, of the last step

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return self.trajectory.latents.shape[-2], self.trajectory.latents.shape[-1]

    @property
    def base(self) -> Mixture:
        """The prediction that the inversion made."""
        source, empty = RowKey(self.prompts.source), RowKey(self.prompts.empty)
        return guided_by(source, empty, self.trajectory.source_guidance)

    @property
    def source_side(self) -> Mixture:
        """The prediction that directions start from."""
        source, negative = RowKey(self.prompts.source), RowKey(self.prompts.negative)
        return guided_by(source, negative, self.settings.source_guidance_scale)

    def directions(self, step: int) -> list[Mixture]:
        """f of each text; their sum is that of the product of experts."""
        negative = RowKey(self.prompts.negative)
        return [
            mixed(
                (guided_by(self._row(at, step), negative, text.guidance_scale), text.weight),
                (self.source_side, -text.weight),
            )
            for at, text in enumerate(self.prompts.texts)
        ]

    def contrasts(self, step: int) -> list[Mixture]:
        """How each text's prediction differs from the source's, without guidance: what masks are made of.

        f itself has whatever the two guidances differ by, which is all that both prompts say: it shows the whole image.
        """
        if self.settings.mask == "none":
            return []
        source = {RowKey(self.prompts.source): -1.0}
        return [mixed((source, 1.0), ({self._row(at, step): 1.0}, 1.0)) for at in range(len(self.prompts.texts))]

    def _row(self, at: int, step: int) -> RowKey:
        """The row of a text at a step."""
        controlled = self.attention is not None and self.attention.reads(step)
        return RowKey(self.prompts.texts[at].prompt, at if controlled else None)

    def run(self) -> Steps[EditedLatents]:
        """The whole walk."""
        state = yield from self.begin()
        for step in range(self.trajectory.num_steps):
            state = yield from self.take(step, state)
            if tell := observer():
                masks = no_masks(state.latents) if self.masks is None else self.masks
                source = self.trajectory.latents[step + 1]
                tell(StepRecord(step=step, latents=state.latents, masks=masks, source_latents=source))
        return EditedLatents(latents=state.latents, masks=self.masks)

    def begin(self) -> Steps[State]:
        """The latents before the first step, and what all steps need."""
        trajectory = self.trajectory
        if trajectory.noise_maps is None:
            yield from self._find_residuals()
        latents, above = trajectory.latents[0], trajectory.level_above
        if self.settings.form == "implicit" and self.attention is None and above is not None and self.prompts.texts:
            # The step that was left out is edited as it would have been: implicitly, at the level that it leads to.
            last_skipped = dataclasses.replace(  # type: ignore[type-var]  # every solver is a dataclass
                trajectory.solver, steps=(Step(above, trajectory.levels[0]),)
            )
            total = mixed(*((direction, 1.0) for direction in self.directions(0)))
            found = yield from self._evaluate(0, latents, trajectory.levels[0], [total], trajectory.latents[0])
            latents = latents + edit_move(last_skipped, 0, at_level(found.sums[0].noise, above))
        return State(latents, None)

    def _find_residuals(self) -> Steps[None]:
        """By how much each deterministic step of the source misses the trajectory; all asked for in one go."""
        trajectory, steps = self.trajectory, self.trajectory.num_steps
        weights = {key.prompt: weight for key, weight in self.base.items()}
        # Views of the trajectory, where one prompt is enough: edits of one image then share these rows.
        latents = trajectory.latents[:-1]
        denoised: Denoised = yield Denoise(
            latents if len(weights) == 1 else latents.repeat(len(weights), 1, 1, 1),
            [*trajectory.levels] * len(weights),
            [prompt for prompt in weights for _ in range(steps)],
        )
        parts = [denoised.predictions[at * steps : (at + 1) * steps] for at in range(len(weights))]
        base = combined(parts, list(weights.values()))
        means = [
            trajectory.solver.transition(step, trajectory.latents[step], base[step], None).mean for step in range(steps)
        ]
        self.residuals = trajectory.latents[1:] - torch.stack(means)

    def take(self, step: int, state: State) -> Steps[State]:
        """One step."""
        start = self.trajectory.levels[step]
        # Implicitly, a direction of the noise is found at a level and used at the one above, whose signal it is divided
        # by: without any the step is explicit.
        implicit = self.settings.form == "implicit" and start.signal > 0
        moved = yield from (self._implicit(step, state) if implicit else self._explicit(step, state))
        return self._bounded(step, moved)

    def _base_point(self, step: int, state: State, prediction: Prediction) -> State:
        """Where the step leads without an edit."""
        latents, data_pred = take_step(self.trajectory, step, state.latents, prediction, state.data_pred)
        return State(latents if self.residuals is None else latents + self.residuals[step], data_pred)

    def _explicit(self, step: int, state: State) -> Steps[State]:
        """All directions where the step starts."""
        trajectory, start = self.trajectory, self.trajectory.levels[step]
        directions = self.directions(step)
        guided = [self._guided(directions)] if self._climbing(step) else []
        wanted = [self.base, *directions, *self.contrasts(step), *guided]
        found = yield from self._evaluate(step, state.latents, start, wanted, trajectory.latents[step])
        base = self._base_point(step, state, found.sums[0])
        latents, data_pred = base
        parts = found.sums[1 : 1 + len(directions)]
        if parts:
            direction = combined(parts, [1.0] * len(parts))
            latents = latents + edit_move(trajectory.solver, step, direction, multistep=state.data_pred is not None)
            data_pred = None if data_pred is None else data_pred + direction.data
            self._note(found.sums[1 + len(parts) : 1 + 2 * len(parts)], found.seen)
        estimate = found.sums[-1].data
        latents = yield from self._climb(step, latents, lambda _: estimate, parts)
        return State(latents, data_pred)

    def _implicit(self, step: int, state: State) -> Steps[State]:
        """Directions where the step ends, at the point that is being moved."""
        settings, trajectory = self.settings, self.trajectory
        start, end = trajectory.solver.steps[step]
        end = end._replace(timestep=max(end.timestep, 0))  # behind the last timestep the model is told the last one
        found = yield from self._evaluate(step, state.latents, start, [self.base], trajectory.latents[step])
        base = self._base_point(step, state, found.sums[0])
        latents, data_pred = base
        directions = self.directions(step)
        climbs = self._climbing(step)
        wanted = [*directions, *self.contrasts(step), *([self._guided(directions)] if climbs else [])]
        for inner in range(settings.inner_steps if wanted else 0):
            found = yield from self._evaluate(step, latents, end, wanted, trajectory.latents[step + 1])
            parts = found.sums[: len(directions)]
            if directions:
                direction = combined(parts, [1.0] * len(parts)).noise
                if inner > 0:
                    latents = reconstruction_pull(latents, base.latents, direction, settings.reconstruction_weight)
                used = at_level(direction, start)
                latents = latents + edit_move(trajectory.solver, step, used, multistep=state.data_pred is not None)
                data_pred = None if data_pred is None else data_pred + used.data
                if inner == settings.inner_steps - 1:
                    self._note(found.sums[len(parts) : 2 * len(parts)], found.seen)
            if climbs:
                latents = yield from self._climb(step, latents, partial(clean, found.sums[-1].noise, end), parts)
        return State(latents, data_pred)

    def _guided(self, directions: Sequence[Mixture]) -> Mixture:
        """The prediction under all texts, of which rewards see the clean image: under the source alone without any."""
        if not directions:
            return self.base
        return mixed((self.source_side, 1.0), *((direction, 1.0) for direction in directions))

    def _evaluate(
        self, step: int, latents: Tensor, level: Level, wanted: Sequence[Mixture], source: Tensor
    ) -> Steps[Evaluation]:
        """Weighted sums of the predictions for one latent; `source`: the source's latents at that level."""
        keys = list(dict.fromkeys(key for mixture in wanted for key in mixture))
        nothing = Prediction(torch.zeros_like(latents), torch.zeros_like(latents))
        if not keys:
            return Evaluation([nothing for _ in wanted], None)
        rows, prompts, control = [latents] * len(keys), [key.prompt for key in keys], None
        targets = {key.target: at for at, key in enumerate(keys) if key.target is not None}
        if targets and self.attention is not None:
            rows, prompts = [*rows, source], [*prompts, self.prompts.source]
            control = self.attention.control(step, len(keys), targets)
        denoised: Denoised = yield Denoise(torch.stack(rows), [level] * len(rows), prompts, control=control)
        by_row = {key: denoised.predictions[at] for at, key in enumerate(keys)}
        sums = [
            combined([by_row[key] for key in mixture], list(mixture.values())) if mixture else nothing
            for mixture in wanted
        ]
        return Evaluation(sums, denoised.seen)

    def _note(self, contrasts: Sequence[Prediction], seen: Seen | None) -> None:
        """Keep what masks are made of; without `mask` nothing of the contrasts is read."""
        if self.attention is not None:
            self.attention.see(seen)
        if self.settings.mask != "none":
            powers = torch.stack([one.data.square().sum(dim=0) for one in contrasts])
            smooth = smooth_attention(smooth_attention(powers.float()))
            self.strengths = smooth if self.strengths is None else self.strengths + smooth

    def _climbing(self, step: int) -> list[Climb]:
        """The rewards that act at a step."""
        return [climb for climb in self.climbs if climb.acts(step, self.trajectory.num_steps)]

    def _climb(
        self, step: int, latents: Tensor, estimate: Callable[[Tensor], Tensor], directions: Sequence[Prediction]
    ) -> Steps[Tensor]:
        """Descend every reward's loss in turn.

        Args:
            step: which one.
            latents: (C, h, w) after the step, so far.
            estimate: of the clean latents, from them.
            directions: of the texts, for rewards that are measured by these.
        """
        signal = self.trajectory.solver.steps[step].end.signal
        for climb in self._climbing(step):
            valued: Valued = yield DecodeGradient(estimate(latents), climb.value_and_grad)
            gradient = valued.gradient
            power = float(gradient.square().sum())
            if power == 0.0:
                continue
            match climb.reward.step:
                case "gradient":
                    length = 1.0
                case "direction":
                    total = combined(list(directions), [1.0] * len(directions)).noise
                    length = rms(total) / rms(gradient)
                case "loss":  # the estimate moves by 1 / signal of what the latents do
                    length = signal * valued.value / power
            latents = latents - climb.reward.weight * length * gradient
        return latents

    def _bounded(self, step: int, state: State) -> State:
        """The source's latents wherever nothing may change."""
        latents, data_pred = state
        source = self.trajectory.latents[step + 1]
        editable = self._editable(step)
        if editable is not None:
            latents = torch.where(editable, latents, source)
            if data_pred is not None and self.trajectory.data_preds is not None:
                data_pred = torch.where(editable, data_pred, self.trajectory.data_preds[step])
        if self.user_mask is not None:
            latents = source + self.user_mask.to(latents) * (latents - source)
        return State(latents, data_pred)

    def _editable(self, step: int) -> Tensor | None:
        """(h, w) bool: what may differ from the source after a step; None: everything."""
        if self.attention is not None and self.attention.blend is not None:
            inside = self.attention.blend_mask(step, self.size)
            self.masks = None if inside is None else inside[None]
            return inside
        if self.settings.mask == "none" or self.strengths is None:
            return None
        self.masks = self._running_masks(self.strengths)
        editable = dilated(self.masks.any(dim=0), self.settings.mask_margin)
        for climb in self._climbing(step):
            editable = editable | (torch.ones_like(editable) if climb.region is None else climb.region)
        return editable

    def _running_masks(self, strengths: Tensor) -> Tensor:
        """(K, h, w) bool: where each text has changed the image most, in all steps so far."""
        of_image = self.trajectory.source.of_image
        if self.settings.mask == "otsu":
            return above_otsu(strengths.sqrt(), of_image)
        thresholds = strengths.new_tensor([text.threshold for text in self.prompts.texts])
        return strongest_region(strengths, thresholds, of_image(strengths))
