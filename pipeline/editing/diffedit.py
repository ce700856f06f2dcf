"""DiffEdit (Couairon et al., arXiv 2210.11427): find where two texts disagree about an image, change it only there.

The image is noised a few times; where the predictions under the target text differ most from those under the source
text is the mask. Then the inverted image is sampled under the target text, and outside of the mask it is put back on
its trajectory after every step.

Cost: K rows for each text that is compared, two as a rule, in one go; then two rows per step (one at guidance 1), none
where the mask is empty. Without guidance: in a difference of two predictions it is only a factor, and the threshold is
relative. With a user's mask nothing is compared. Masks: one. Memory: N + 1 latents per image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level, Prediction
from pipeline.diffusion.masks import above_average, dilated
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem, target_problems
from pipeline.editing.walk import inside_of, start_of, take_step
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Steps
from pipeline.engine.prompts import GuidedPrompt, repeated
from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory, WordPair


class DiffEdit(EditingMethod):
    """Edit inside of a mask that the two texts give, or that the user brings."""

    needs: ClassVar = frozenset({"DDIM steps", "path"})
    takes: ClassVar = frozenset({"source branch"})
    paper: ClassVar = "DiffEdit: Diffusion-based semantic image editing with mask guidance, arXiv 2210.11427"

    method: Literal["diffedit"] = "diffedit"
    """DiffEdit: an edit inside a mask that the difference of two texts gives."""
    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of the target text inside the mask; 1: none."""
    num_maps: int = Field(default=10, ge=1)
    """K: draws of noise that the mask is averaged over."""
    mask_encode_strength: float = Field(default=0.5, gt=0, le=1)
    """Share of the schedule whose noise is put on the image for the mask; 1: noise alone."""
    mask_thresholding_ratio: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Inside is what differs by more than half of this times the mean difference; larger: smaller masks. 3 as in the
    paper's implementation; 2, all above the mean, is what normalising by mean and deviation gives."""
    dilate: int = Field(default=0, ge=0)
    """How often a computed mask is dilated by a square of 3 x 3 latent pixels."""
    background: Literal["aligned", "reference"] = "aligned"
    """What stands outside the mask after a step. aligned: the trajectory at the level that the step leads to, hence the
    image itself at the end; reference: one level noisier, as in the maintained implementation, hence never quite the
    image."""

    @property
    @override
    def guides(self) -> bool:
        return self.guidance_scale != 1.0

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)
        try:
            compared_texts(request)
        except PrepareError as error:
            yield Problem("blend_words that do not pair up", str(error))

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        try:
            self.noised_steps(inversion.schedule_steps)
        except PrepareError as error:
            yield str(error)

    def noised_steps(self, total_steps: int) -> int:
        """Steps of the schedule that would remove the mask's noise.

        Raises:
            PrepareError: there is none.
        """
        steps = int(total_steps * self.mask_encode_strength)
        if steps == 0:
            raise PrepareError(
                f"mask_encode_strength {self.mask_encode_strength:g} of {total_steps} steps is less than one: there is "
                "no noise to compare the texts at. Raise mask_encode_strength or inversion.num_steps"
            )
        return steps

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        if user_mask is None:
            maps = yield from self.difference_maps(trajectory, compared_texts(request))
            mask = dilated(
                above_average(maps, self.mask_thresholding_ratio, trajectory.source.of_image).any(dim=0), self.dilate
            )
        else:
            mask = inside_of(user_mask)
        kept = trajectory.latents[1:] if self.background == "aligned" else trajectory.latents[:-1]
        latents = kept[-1]
        if mask.any():
            prompt = yield from GuidedPrompt.encode(request.target_prompt, self.guidance_scale, request.negative_prompt)
            prompt = dataclasses.replace(prompt, beside=(yield from self.beside(trajectory, mask)))
            latents, previous = start_of(trajectory, 0)
            for step, level in enumerate(trajectory.levels):
                prediction = yield from prompt.predict(latents, level)
                latents, previous = take_step(trajectory, step, latents, prediction, previous)
                latents = torch.where(mask, latents, kept[step])
                if tell := observer():
                    tell(StepRecord(step=step, latents=latents, masks=mask[None], source_latents=kept[step]))
        return EditedLatents(latents=latents, masks=mask[None])

    def difference_maps(self, trajectory: Trajectory, texts: list[tuple[str, str]]) -> Steps[Tensor]:
        """How much the predictions under the two texts of each of P pairs differ, (P, h, w), at least 0.

        Mean over draws and channels of the absolute difference. The noise is the same for all texts.
        """
        source = trajectory.source
        total = trajectory.total_steps
        level = source.schedule.steps(total, source.size)[total - self.noised_steps(total)].start
        distinct = tuple(dict.fromkeys(text for pair in texts if pair[0] != pair[1] for text in pair))
        if not distinct:
            return torch.zeros((len(texts), *source.latents.shape[-2:]), dtype=source.latents.dtype)
        draw = source.editing_noise()
        noised = torch.stack([level.noised(source.latents, draw()) for _ in range(self.num_maps)])
        rows = self.num_maps * len(distinct)
        everything = torch.ones(source.latents.shape[-2:], dtype=torch.bool)
        beside = yield from self.beside(trajectory, everything)
        prompts = yield EncodeText(distinct)
        denoised: Denoised = yield Denoise(
            noised.repeat(len(distinct), 1, 1, 1),
            [level] * rows,
            [prompt for prompt in prompts for _ in range(self.num_maps)],
            beside=repeated(beside, rows),
        )
        by_text = {
            text: denoised.predictions[at * self.num_maps : (at + 1) * self.num_maps]
            for at, text in enumerate(distinct)
        }
        return torch.stack(
            [
                torch.zeros_like(noised[0, 0])
                if source_text == target
                else difference(by_text[target] - by_text[source_text], level)
                for source_text, target in texts
            ]
        )

    def beside(self, trajectory: Trajectory, mask: Tensor) -> Steps[dict[str, Tensor]]:
        """What the network is given beside the latents to repaint a mask (h, w) bool, of one row, by name."""
        return {}
        yield  # a generator, since an editor that has something to give must encode it


def difference(direction: Prediction, level: Level) -> Tensor:
    """(h, w): by the noise, as the paper has it; by the data where the draws (K, C, h, w) are nothing but noise."""
    return (direction.noise if level.signal > 0 else direction.data).abs().mean(dim=(0, 1))


def compared_texts(request: EditRequest) -> list[tuple[str, str]]:
    """Pairs (source, target) of texts whose masks are united: the two prompts, or the phrases of `blend_words`.

    Raises:
        PrepareError: the phrases do not pair up.
    """
    words = request.blend_words or WordPair()
    sources = words.source or (request.source_prompt,)
    targets = words.target or (request.target_prompt,)
    pairs = max(len(sources), len(targets))
    if len(sources) not in (1, pairs) or len(targets) not in (1, pairs):
        raise PrepareError(
            f"blend_words has {len(sources)} phrases under source and {len(targets)} under target, which do not pair "
            "up. Give as many of both, or one (or none: the whole prompt) on one side"
        )
    return list(zip(sources * (pairs // len(sources)), targets * (pairs // len(targets)), strict=True))
