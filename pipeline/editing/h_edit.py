"""h-Edit (Nguyen et al., arXiv 2503.02187): editing as a bridge by Doob's h-transform.

Every reverse step is a move that alone would bring the source image back exactly, and moves along directions that alone
carry the edit: differences of predictions under texts, gradients of rewards. These add up, so that several texts and
rewards act in one trajectory, without training. After edit-friendly inversion this is the paper's form R, after DDIM
inversion its form D.

Cost per step, with K texts and J inner steps: explicit 2 + K network rows, implicit 1 + J (2 + K); one more per
evaluation while attention is replaced, or a mask read from it. After DDIM inversion N rows more, in one go. A reward
takes a pass through the decoder and back per evaluation. Reconstruction: exact, by construction. Masks: one with blend
words, one per text with `mask`, else the user's. Memory: N + 1 latents, twice that after DDIM inversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import override

from pipeline.diffusion.masks import blended, softly_eroded
from pipeline.editing.base import EditingMethod
from pipeline.editing.h_control import TargetAttention
from pipeline.editing.h_problems import of_experts, of_rewards, of_words
from pipeline.editing.h_walk import Climb, HWalk, Prompts, Text
from pipeline.editing.problems import Problem, window_problems
from pipeline.editing.walk import inside_of
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import EncodeText, Steps
from pipeline.errors import PrepareError
from pipeline.experts import TextExpert
from pipeline.inversion.base import Inversion
from pipeline.inversion.direct import DirectInversion
from pipeline.models.reward_networks import LearnedReward, network, picture, weights_problem
from pipeline.records import EditedLatents, EditRequest, Source, Trajectory, Window
from pipeline.rewards import Reward, RewardSample


class HEdit(EditingMethod):
    """Bring the source back, and add what texts and rewards pull towards."""

    needs: ClassVar = frozenset({"path"})
    takes: ClassVar = frozenset({"source branch"})
    paper: ClassVar = "h-Edit: Effective and Flexible Diffusion-Based Editing via Doob's h-Transform, arXiv 2503.02187"

    method: Literal["h_edit"] = "h_edit"
    """h-Edit: a move that rebuilds the source, and moves towards texts and rewards that add up."""
    form: Literal["implicit", "explicit"] = "implicit"
    """Where directions are found. implicit: where the step ends, at the point that is moved; explicit: where it starts,
    which takes one network row less."""
    guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Classifier-free guidance of the target's side of a direction."""
    source_guidance_scale: float = Field(default=5.0, allow_inf_nan=False)
    """Classifier-free guidance of the source's side: near the target's, but below. Far below it, the direction is also
    guidance towards all that both prompts say, and stronger."""
    inner_steps: int = Field(default=1, ge=1)
    """J, with form: implicit: moves per step, each of full size. More is a stronger edit, not a finer one."""
    reconstruction_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """From the second inner step on, a pull back to the base point, as a share of the direction's size; 0 to 0.1."""
    control: Literal["prompt_to_prompt", "none"] = "prompt_to_prompt"
    """Whether the targets' attention maps are overwritten by the source's."""
    kind: Literal["refine", "replace", "reweight"] = "refine"
    """With control: how target tokens find their source tokens, as in prompt_to_prompt."""
    cross_replace_steps: Window = (0.0, 0.4)
    """With control: when cross-attention maps are overwritten, as shares of the steps that are walked."""
    self_replace_steps: Window = (0.0, 0.35)
    """With control: when self-attention maps are overwritten, as shares of the steps that are walked. The paper's form
    D has 0.6."""
    self_replace_factor: int = Field(default=2, ge=1)
    """In maps at least so much coarser than the latents self-attention is overwritten; a power of two."""
    start_blend: float = Field(default=0.2, ge=0, le=1)
    """Share of the steps before local blending begins; read with blend_words."""
    blend_threshold: float = Field(default=0.3, ge=0, le=1)
    """Share of its maximum from which on the attention of blend_words is inside; higher: smaller regions."""
    subtract_threshold: float = Field(default=0.3, ge=0, le=1)
    """Share of its maximum from which on the attention of subtract_words is left out."""
    aligned_tail: bool = False
    """With kind replace: keep words behind a change of token count together; the published code does not."""
    mask: Literal["none", "otsu", "quantile"] = "none"
    """Not in the paper: keep the source outside of where the directions of all steps so far together change the image.
    otsu: the upper of the two classes that these changes fall into; quantile: the strongest, by mask_threshold."""
    mask_threshold: float = Field(default=0.9, ge=0, lt=1)
    """With mask: quantile, the share of the image's area that is left out."""
    mask_margin: int = Field(default=1, ge=0, le=8)
    """With a mask, cells of the latents by which it is widened. 0 keeps more of the background, for what changes within
    its outline."""
    user_mask: Literal["bounds", "rewards"] = "bounds"
    """What a row's own mask is for. bounds: the source stays outside of it, and rewards read it; rewards: they alone
    read it."""
    composite: bool = False
    """Put the edit into the source by the row's mask at last, in pixels: eroded, with a soft edge, as the paper does
    with faces."""
    weights: dict[LearnedReward, str] = Field(default_factory=dict)
    """Folders with the networks of learned rewards: clip, arcface, lpips. What each must hold stands on the page of the
    method."""
    references: dict[str, str] = Field(default_factory=dict)
    """Pictures that rewards compare with, by the names that these use: paths of files on every worker."""

    @model_validator(mode="after")
    def _settings_fit(self) -> HEdit:
        if self.form == "explicit" and self.inner_steps > 1:
            raise ValueError(
                f"form: explicit has no inner steps, and inner_steps is {self.inner_steps}. Set form: implicit, or "
                "leave inner_steps out"
            )
        return self

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if self.control == "prompt_to_prompt" and not offers.openings.layers:
            yield (
                "control: prompt_to_prompt replaces cross-attention maps, and this model has no cross-attention. Set "
                "editing.control: none"
            )
        # Before a run, like what the model lacks: a recipe may be written where the folders are not.
        for kind, folder in self.weights.items():
            yield from weights_problem(kind, folder)
        for name, path in self.references.items():
            if not Path(path).expanduser().is_file():
                yield f"references names '{path}' as '{name}', and there is no such file. Correct editing.references"

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from of_experts(self, request)
        yield from of_rewards(self, request)
        yield from of_words(self, request, inversion, caption_follows=caption_follows)

    @override
    def problems_of_row(self, request: EditRequest, inversion: Inversion, *, masked: bool) -> Iterator[Problem]:
        yield from super().problems_of_row(request, inversion, masked=masked)
        needing = ["composite: true"] if self.composite else []
        needing += [f"reward {reward.method}" for reward in request.rewards if reward.reads_mask]
        if needing and not masked:
            yield Problem(
                f"{needing[0]} without a mask",
                f"{needing[0]} needs the row's own mask, and the row brings none. Name source.mask, or leave it out",
            )

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if isinstance(inversion, DirectInversion) and inversion.pin_shares(inversion.num_steps) is not None:
            yield (
                "h_edit keeps its source on the trajectory, and the inversion's offset_scale and interval let it "
                "drift. Leave them at 1"
            )
        if self.control == "prompt_to_prompt":
            for name in ("cross_replace_steps", "self_replace_steps"):
                yield from window_problems(name, getattr(self, name), inversion, of_walked=True)

    def texts_of(self, request: EditRequest) -> tuple[TextExpert, ...]:
        """All texts that act, the target prompt first."""
        target = (TextExpert(prompt=request.target_prompt),) if request.target_prompt else ()
        return tuple(text for text in (*target, *request.experts) if text.weight != 0.0)

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        walk = yield from self.walk(trajectory, request, user_mask)
        return (yield from walk.run())

    def walk(self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None) -> Steps[HWalk]:
        """Everything that can be known before the first step.

        Raises:
            PrepareError: a word is not in its prompt, prompts cannot be aligned, or a reward lacks what it reads.
        """
        prompts = yield from self._encode(trajectory, request)
        attention = None
        if self.control == "prompt_to_prompt" and prompts.texts:
            targets = [text.prompt for text in prompts.texts]
            attention = TargetAttention(self, trajectory, prompts.source, targets, request)
        return HWalk(
            settings=self,
            trajectory=trajectory,
            prompts=prompts,
            climbs=tuple(self._climb(reward, trajectory, user_mask) for reward in request.rewards),
            attention=attention,
            user_mask=user_mask if self.user_mask == "bounds" else None,
        )

    def _encode(self, trajectory: Trajectory, request: EditRequest) -> Steps[Prompts]:
        texts = self.texts_of(request)
        source, empty, negative, *targets = yield EncodeText(
            (
                trajectory.source_prompt,
                trajectory.source.negative_prompt,
                request.negative_prompt,
                *(text.prompt for text in texts),
            )
        )
        return Prompts(
            source=source,
            empty=empty,
            negative=negative,
            texts=tuple(
                Text(
                    prompt=target,
                    weight=text.weight,
                    guidance_scale=self.guidance_scale if text.guidance_scale is None else text.guidance_scale,
                    threshold=self.mask_threshold if text.threshold is None else text.threshold,
                )
                for text, target in zip(texts, targets, strict=True)
            ),
        )

    def _climb(self, reward: Reward, trajectory: Trajectory, user_mask: Tensor | None) -> Climb:
        pixels = trajectory.source.pixels
        if pixels is None:
            raise PrepareError("rewards compare pictures, and this trajectory was made without one. Give it the image")
        kind = next((one for one in self.weights if one == reward.learned), None)
        reference = self.references.get(getattr(reward, "reference", ""))
        sample = RewardSample(
            image=as_tensor(pixels),
            mask=_in_pixels(trajectory.source, user_mask),
            reference=None if reference is None else picture(reference),
            network=None if kind is None else network(kind, self.weights[kind]),
        )
        return Climb(reward=reward, sample=sample, region=None if user_mask is None else inside_of(user_mask))

    @override
    def composited(self, pixels: np.ndarray, image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        if not self.composite or mask is None:
            return pixels
        over, under, region = (torch.from_numpy(np.ascontiguousarray(one)) for one in (pixels, image, mask))
        return blended(over, under, softly_eroded(region.float())).numpy()


def _in_pixels(source: Source, user_mask: Tensor | None) -> Tensor | None:
    """(H, W): the row's mask as rewards read it. A latent cell that it crosses would draw what lies beside it along."""
    if source.mask is not None:
        return torch.from_numpy(np.ascontiguousarray(source.mask)).float()
    if user_mask is None or source.pixels is None:
        return None
    return interpolate(user_mask[None, None], size=source.pixels.shape[:2])[0, 0]


def as_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 127.5 - 1.0
