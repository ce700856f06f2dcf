"""One group of a ConsiStory set: the anchors, and as many scenes as share their rows, sampled twice side by side.

The anchors read each other, a scene reads itself and the anchors: so the anchors' numbers are the same in every group,
and a scene's do not depend on which other scenes there are. A group always has the same number of rows, since bits are
equal within one shape of call alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.guidance import classifier_free_guidance
from pipeline.diffusion.levels import Prediction
from pipeline.diffusion.masks import dilated
from pipeline.diffusion.subject import (
    Matches,
    best_matches,
    correspondences,
    smoothed,
    subject_mask,
    taken_shares,
    thinned,
)
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.sharing import (
    Rows,
    injected_features,
    mixed_queries,
    most_sources,
    others_of,
    shared_attention,
    spread,
    who_reads_whom,
)
from pipeline.engine.calls import Conditioning, Denoise, Steps
from pipeline.engine.controls import Blends, Control, Layers, Part, Plan, Reads, Record, Records, Watch
from pipeline.records import DrawNoise, EditedLatents, Trajectory

if TYPE_CHECKING:
    from pipeline.editing.consistory import ConsiStory

SUMS = 8  # tokens that are watched of a row, at most: the same for all sets, so that they share network calls
FACTORS = (1, 2, 4, 8)  # latents' side over that of the maps at which images may read each other


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SetImage:
    """One image of a group: an anchor or a scene."""

    prompt: Conditioning
    uncond: Conditioning
    weights: Tensor  # (S, L), one row for each token whose attention is watched
    noise: Callable[[], DrawNoise]  # its own, from its beginning
    pinned: Tensor | None = None  # (N + 1, C, h, w) latents that it has at every step; None: it is sampled


class Walked(NamedTuple):
    """What one pass came to."""

    latents: list[Tensor]  # (C, h, w) per image
    masks: dict[int, Tensor]  # (B, h', w') bool by factor: where the subject is, after the last step
    features: Tensor | None  # (B, C', h', w') of the decoder, where they were recorded


class Injection(NamedTuple):
    """What the second pass takes from the first."""

    matches: Matches
    shares: Tensor  # (B, P)


class Group:
    """Some images that are sampled together.

    Args:
        settings: of the method.
        trajectory: whose solver is walked.
        images: the anchors, then scenes.
        anchors: how many of them are anchors.
        draws: noise by purpose, of the set.
    """

    def __init__(
        self,
        settings: ConsiStory,
        trajectory: Trajectory,
        images: tuple[SetImage, ...],
        anchors: int,
        draws: Callable[[str], DrawNoise],
    ) -> None:
        self.settings, self.trajectory, self.images, self.anchors = settings, trajectory, images, anchors
        self.draws = draws
        self.rows = Rows(len(images), 1 if settings.guidance_scale == 1.0 else 2)
        self.reads = who_reads_whom(len(images), anchors)
        self.size = (trajectory.latents.shape[-2], trajectory.latents.shape[-1])

    def run(self) -> Steps[list[EditedLatents]]:
        """Both passes; one result per image, with the mask of its subject."""
        walked = yield from self._walk(None)
        if self.settings.injects:
            walked = yield from self._walk(self._injection(walked))
        masks = spread(walked.masks[self.settings.injection_factor], self.size)
        return [
            EditedLatents(latents=latents, masks=mask[None])
            for latents, mask in zip(walked.latents, masks, strict=True)
        ]

    def _injection(self, first: Walked) -> Injection:
        """Which places take after which (section 4.3), by the features and the last masks of the first pass."""
        assert first.features is not None  # recorded where anything is injected
        masks = first.masks[self.settings.injection_factor]
        places, distances = correspondences(smoothed(first.features), masks, self.reads)
        matches = best_matches(places, distances, self.reads)
        return Injection(matches, taken_shares(matches, masks.flatten(1), self.settings.injection_strength))

    def _walk(self, injection: Injection | None) -> Steps[Walked]:
        """Sample all images from noise to their end."""
        trajectory, settings = self.trajectory, self.settings
        draws = [image.noise() for image in self.images]
        latents = [
            draw() if image.pinned is None else image.pinned[0] for image, draw in zip(self.images, draws, strict=True)
        ]
        previous: list[Tensor | None] = [None] * len(latents)
        maps: deque[Tensor] = deque(maxlen=settings.mask_steps)
        masks: dict[int, Tensor] = {}
        features = None
        tell = observer() if injection is not None or not settings.injects else None  # of the pass that counts
        for step in range(trajectory.num_steps):
            denoised = yield self._call(step, latents, masks, injection)
            for at, (image, draw) in enumerate(zip(self.images, draws, strict=True)):
                if image.pinned is not None:
                    # Copied, never recomputed: a replayed source drifts away by the rounding of every step.
                    latents[at] = image.pinned[step + 1]
                    continue
                prediction = self._guided(denoised.predictions, at)
                mean, sigma, previous[at] = trajectory.solver.transition(step, latents[at], prediction, previous[at])
                latents[at] = mean + sigma * draw() if sigma > 0 else mean
            assert denoised.seen is not None
            assert denoised.seen.watched is not None
            maps.append(denoised.seen.watched[self.rows.cond(0) :][: len(self.images)])
            masks = self._masks(torch.stack([*maps]).mean(dim=0))
            if denoised.seen.recorded:
                features = torch.stack(denoised.seen.recorded)
            if tell:
                shown = spread(masks[settings.injection_factor], self.size)
                tell(
                    StepRecord(
                        step=step,
                        latents=latents[-1],
                        masks=shown[-1:],
                        source_latents=latents[0],
                    )
                )
        return Walked(latents, masks, features)

    def _guided(self, predictions: Prediction, image: int) -> Prediction:
        cond = predictions[self.rows.cond(image)]
        if self.rows.halves == 1:
            return cond
        return classifier_free_guidance(predictions[self.rows.of(image, 0)], cond, self.settings.guidance_scale)

    def _masks(self, maps: Tensor) -> dict[int, Tensor]:
        """By factor where each image's subject is, (B, h', w') bool, of mean maps (B, S, mh, mw)."""
        factors = {*FACTORS, self.settings.injection_factor}
        grids = {factor: (-(-self.size[0] // factor), -(-self.size[1] // factor)) for factor in factors}
        inverted = self.settings.mask == "background"
        logarithm = self.settings.mask_threshold == "logarithm"
        return {
            factor: torch.stack(
                [
                    subject_mask(of_image[: len(image.weights)], grid, logarithm=logarithm) ^ inverted
                    for image, of_image in zip(self.images, maps, strict=True)
                ]
            )
            for factor, grid in grids.items()
        }

    def _call(
        self, step: int, latents: list[Tensor], masks: Mapping[int, Tensor], injection: Injection | None
    ) -> Denoise:
        """The network call of one step: either half of all images, and once more those that read nobody."""
        conditioning = [image.uncond for image in self.images] if self.rows.halves == 2 else []
        conditioning += [image.prompt for image in self.images]
        strength = self.settings.query_strengths(self.trajectory.num_steps).get(step)
        copies = self.rows.halves * (1 if strength is None else 2)
        count = len(latents) * copies
        return Denoise(
            torch.stack(latents * copies),
            [self.trajectory.levels[step]] * count,
            conditioning if strength is None else conditioning * 2,
            control=self._control(step, masks, injection, strength),
        )

    def _control(
        self, step: int, masks: Mapping[int, Tensor], injection: Injection | None, strength: float | None
    ) -> Control:
        settings, steps = self.settings, self.trajectory.num_steps
        cond = [self.rows.cond(image) for image in range(len(self.images))]
        parts: list[Part] = [Watch(row, image.weights) for row, image in zip(cond, self.images, strict=True)]
        reads: tuple[Reads, ...] = ()
        if settings.shares and step >= settings.first_shared_step:
            for factor in FACTORS:
                layers = settings.shared_layers(factor)
                shown = self._shown(step, factor, masks)
                parts += shared_attention(self.reads, shown, layers, self.size, self.rows, settings.anchor_weight)
            readers = self.rows.halves * sum(map(bool, others_of(self.reads)))
            reads = tuple(
                Reads(
                    layers=settings.shared_layers(factor),
                    slots=readers,
                    sources=most_sources(self.reads),
                    classes="given",
                    weighted=settings.anchor_weight != 1,
                )
                for factor in FACTORS
            )
        if strength is not None:
            parts += mixed_queries(self.rows, settings.mixing_layers, strength)
        injects = injection is not None and step in settings.injection_range(steps)
        if injection is not None and injects:
            parts += injected_features(*injection, settings.injection_layers, self.rows)
        records = settings.injects and injection is None and step == settings.feature_step(self.trajectory.levels)
        if records:
            parts += [Record(row, settings.feature_block) for row in cond]
        plan = Plan(
            sums=SUMS,
            watched=None if settings.mask_layers is None else Layers(indices=frozenset(settings.mask_layers)),
            query_mixes=strength is not None,
            reads=reads,
            blends=(Blends(layers=settings.injection_layers, slots=len(self.images)),) if injects else (),
            records=(Records(where=settings.feature_block, slots=len(self.images)),) if records else (),
            free_u=settings.decoder_factors,
        )
        return Control(tuple(parts), plan)

    def _shown(self, step: int, factor: int, masks: Mapping[int, Tensor]) -> Tensor:
        """What others may read: the anchors' subjects, with an outline in coarse maps, thinned anew at every step; all
        of the scenes', which nobody reads.

        Noise below a share of a normal distribution is as good as a uniform number, and one kind of noise is enough.
        """
        shown = masks[factor].clone()
        if self.settings.outlines(factor):
            shown[: self.anchors] = torch.stack([dilated(mask, 1) for mask in shown[: self.anchors]])
        dropout = self.settings.dropout_at(step)
        height, width = shown.shape[1:]
        for anchor in range(self.anchors if dropout > 0 else 0):
            noise = self.draws(f"dropout {step} {factor} {anchor}")()[0, :height, :width]
            shown[anchor] = thinned(shown[anchor], torch.special.ndtr(noise.double()), dropout)
        return shown
