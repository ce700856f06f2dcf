"""ProxEdit (Han et al., arXiv 2306.05414): guidance without its small entries, which damage what should stay.

The direction of guidance passes through a proximal operator (thresholding) before it is scaled. Optionally, where
nothing of the direction is left, late steps pull the latents back to the trajectory, or the predicted image to the
image. The attention is Prompt-to-Prompt's.

Cost: that of `prompt_to_prompt`, whose source rows end with the last window after `negative_prompt`, its native
inversion; they run to the end where the source has a direction of its own that the quantile must see. Masks: one,
Prompt-to-Prompt's with blend words, else where the direction is left. Memory: nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from torch import Tensor
from torch.nn.functional import max_pool2d
from typing_extensions import override

from pipeline import compat
from pipeline.diffusion.levels import Prediction, stacked
from pipeline.diffusion.masks import OfImage, everything, quantile_of
from pipeline.editing.prompt_to_prompt import PromptToPrompt, PromptToPromptEdit
from pipeline.editing.two_branch import BRANCHES, Branch, BranchEdit, Branches, BranchPrediction
from pipeline.records import EditRequest, Trajectory

Prox = Annotated[
    Literal["none", "soft", "hard", "l1_compat"],
    BeforeValidator(compat.prox_by_what_it_computes),
    WithJsonSchema({"enum": ["none", "soft", "hard", "l1_compat", *compat.PUBLISHED]}),
]
"""soft shrinks every entry by the threshold, hard drops those up to it. The published code's `l0` is soft, in spite of
its name, and its `l1` a double shrinking that turns the sign of some negative entries: l1_compat, for parity only."""


def proximal(delta: Float[Tensor, "*shape"], threshold: float, prox: Prox) -> Float[Tensor, "*shape"]:
    """A direction of guidance without its small entries (ProxEdit, arXiv 2306.05414, section 3.2)."""
    if prox == "none":
        return delta
    if prox == "hard":
        return torch.where(delta.abs() > threshold, delta, torch.zeros_like(delta))
    shrunk = delta - delta.clamp(-threshold, threshold)
    return compat.shrunk_again(shrunk, threshold) if prox == "l1_compat" else shrunk


def threshold_of(deltas: Float[Tensor, "B C h w"], quantile: float, of_image: OfImage = everything) -> float:
    """The quantile of all magnitudes of one image's B directions, linearly interpolated; or, up to 0, its negative."""
    return -quantile if quantile <= 0 else float(quantile_of(of_image(deltas).abs().flatten(), quantile))


def thresholded(direction: Prediction, threshold: float, prox: Prox) -> Prediction:
    """A direction whose noise is thresholded; its data keeps the same share at each place."""
    kept = proximal(direction.noise, threshold, prox)
    share = torch.where(direction.noise == 0, 1.0, kept / direction.noise)
    return Prediction(kept, direction.data * share)


class ProxEdit(PromptToPrompt):
    """Prompt-to-Prompt under proximal guidance."""

    needs: ClassVar = frozenset({"DDIM steps", "path"})
    paper: ClassVar = "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance, arXiv 2306.05414"

    method: Literal["proxedit"] = "proxedit"  # type: ignore[assignment]  # the tag of the union that recipes are parsed by
    """ProxEdit: Prompt-to-Prompt under proximal guidance."""
    prox: Prox = "soft"
    """How small entries of a direction are dropped. soft: every entry shrinks by the threshold; hard: those up to it
    are dropped; none: all are kept; l1_compat: a double shrinking that turns the sign of some, for parity only. l0 and
    l1 are the published code's names for soft and l1_compat."""
    quantile: float = Field(default=0.7, ge=-100, le=1)
    """Share of the direction's entries, source's and target's together, that the threshold lies above; typical 0.6 to
    0.9. Up to 0 it is the threshold itself, negated. The source's entries are zeros after negative_prompt and direct:
    0.7 is then the target's own 0.4."""
    use_inversion_guidance: bool = False
    """Pull latents back to the trajectory where no direction is left."""
    use_reconstruction_guidance: bool = False
    """Pull the predicted image back to the image where no direction is left."""
    recon_lr: float = Field(default=0.1, gt=0, le=1)
    """How far latents or image are pulled back; 1: all the way."""
    recon_t: int = Field(default=400, ge=-1000, le=1000)
    """Pulls at timesteps below this one; negative: at those above its absolute value."""
    dilate_mask: int = Field(default=1, ge=0)
    """Latent pixels around what is left of a direction that are not pulled back either."""

    @model_validator(mode="after")
    def _settings_fit(self) -> ProxEdit:
        if self.prox == "none" and (self.use_inversion_guidance or self.use_reconstruction_guidance):
            raise ValueError(
                "inversion and reconstruction guidance act where thresholding leaves nothing, and prox is none. Set "
                "prox: soft, or leave these out"
            )
        if problem := direction_problem(self.prox, self.guidance_scale):
            raise ValueError(problem)
        return self

    @override
    def begin(self, trajectory: Trajectory, branches: Branches, request: EditRequest) -> BranchEdit:
        return ProxEditEdit(self, trajectory, branches, request)

    def pulls(self, timestep: float) -> bool:
        """Whether latents are pulled back at a timestep."""
        if not (self.use_inversion_guidance or self.use_reconstruction_guidance):
            return False
        return timestep < self.recon_t or (self.recon_t < 0 and timestep > -self.recon_t)


def direction_problem(prox: Prox, guidance_scale: float) -> str | None:
    """At guidance 1 no unconditional prediction is made, so there is no direction."""
    if prox == "none" or guidance_scale != 1.0:
        return None
    return "at guidance_scale 1 there is no direction to threshold. Raise guidance_scale, or set prox: none"


class ProxEditEdit(PromptToPromptEdit):
    """One edit of one image."""

    def __init__(self, settings: ProxEdit, trajectory: Trajectory, branches: Branches, request: EditRequest) -> None:
        super().__init__(settings, trajectory, branches, request)
        self.proximal_settings = settings
        self.source_has_direction = not trajectory.keeps_source and any(
            uncond is not branches.source for uncond in branches.source_uncond
        )
        self.threshold = 0.0
        self.edit_mask: Tensor | None = None  # (2, C, h, w) bool of source and target: where the direction is left

    @override
    def reads_latents(self, step: int) -> bool:
        """The quantile reads the source's direction, for which the source must be walked."""
        settings = self.proximal_settings
        pools = settings.prox != "none" and settings.quantile > 0 and self.source_has_direction
        return pools or super().reads_latents(step)

    @override
    def guide(
        self, step: int, source: BranchPrediction | None, target: BranchPrediction
    ) -> tuple[Prediction | None, Prediction]:
        """Proximal guidance, thresholded by the noise, which has no direction at a level without signal."""
        settings, level = self.proximal_settings, self.trajectory.levels[step]
        if settings.prox == "none" or level.signal == 0.0:
            return super().guide(step, source, target)
        nothing = target.delta * 0.0
        deltas = stacked([nothing if source is None else source.delta, target.delta])
        threshold = threshold_of(deltas.noise, settings.quantile, self.trajectory.source.of_image)
        deltas = thresholded(deltas, threshold, settings.prox)
        left = deltas.noise.abs() > threshold  # of what is left: for soft, twice the threshold before
        if settings.dilate_mask > 0:
            radius = settings.dilate_mask
            left = max_pool2d(left.to(deltas.noise), 2 * radius + 1, stride=1, padding=radius) > 0
        self.edit_mask, self.threshold = left, threshold
        guided = [
            None
            if branch is None
            else (branch.cond if branch.uncond is None else branch.uncond) + self.guidance_scale * deltas[row]
            for row, branch in enumerate((source, target))
        ]
        assert guided[1] is not None
        return guided[0], guided[1]

    @override
    def move(
        self, step: int, branch: Branch, latents: Tensor, prediction: Prediction, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction guidance."""
        moved, data_pred = super().move(step, branch, latents, prediction, previous)
        settings, (start, end) = self.proximal_settings, self.trajectory.solver.steps[step]
        if settings.use_reconstruction_guidance and settings.pulls(start.timestep) and self.edit_mask is not None:
            # The predicted image alone is pulled: the step's direction keeps the prediction that was guided.
            left = self.edit_mask[BRANCHES.index(branch)]
            pulled = pull(data_pred, self.trajectory.latents[-1], settings.recon_lr, left)
            moved = moved + end.signal * (pulled - data_pred)
        return moved, data_pred

    @override
    def after_step(
        self, step: int, source: Tensor | None, target: Tensor, seen: Any
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Inversion guidance, then LocalBlend."""
        settings = self.proximal_settings
        pulls = settings.use_inversion_guidance and settings.pulls(self.trajectory.levels[step].timestep)
        if pulls and self.edit_mask is not None:
            stored = self.trajectory.latents[step + 1]
            target = pull(target, stored, settings.recon_lr, self.edit_mask[1])
            source = None if source is None else pull(source, stored, settings.recon_lr, self.edit_mask[0])
        source, target, blended = super().after_step(step, source, target, seen)
        return source, target, self.mask() if blended is None else blended

    @override
    def details(self) -> Mapping[str, Tensor]:
        if self.edit_mask is None:
            return {}
        return {"threshold": torch.tensor(self.threshold, dtype=torch.float64), "edit_mask": self.edit_mask}

    @override
    def mask(self) -> Tensor | None:
        if self.edit_mask is None or self.blend is not None:
            return super().mask()
        return self.edit_mask[1].any(dim=0)


def pull(
    latents: Float[Tensor, "C h w"], towards: Float[Tensor, "C h w"], share: float, edit_mask: Bool[Tensor, "C h w"]
) -> Float[Tensor, "C h w"]:
    """Bring latents closer to others outside of a mask; at a share of 1 they become these, bit for bit."""
    return torch.lerp(latents, towards, share * (~edit_mask).to(latents))
