"""What a reward is: a loss of one picture, its settings, and how far an edit goes along its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.errors import PrepareError

Share = Annotated[float, Field(ge=0, le=1)]
Network = Callable[[torch.device], Any]
"""Gives a learned reward's network, on a device, in evaluation mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSample:
    """What a reward may know of the image that is edited, beside its present estimate."""

    image: Tensor  # (3, H, W) in [-1, 1]: the source
    mask: Tensor | None = None  # (H, W) in [0, 1]: the row's own; None: everywhere
    reference: Tensor | None = None  # (3, h, w) in [-1, 1]: the picture that the reward names
    network: Network | None = None  # of a learned reward


class Reward(BaseModel, ABC):
    """One loss of the estimated clean image, at least 0, which an edit descends. Fields are its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: str  # its name in REWARDS; a subclass says which
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How far to go; what 1 means says `step`. 0: the reward does not act."""
    step: Literal["loss", "direction", "gradient"] = "loss"
    """What the weight counts. loss: shares of the way on which the loss, by its slope, would fall to zero; direction:
    multiples of the text direction's size; gradient: the gradient itself, as it is."""
    steps: tuple[Share, Share] = (0.0, 1.0)
    """When it acts: from (included) and to (not included), as shares of the steps that are walked."""

    learned: ClassVar[str] = ""  # which of editing.weights its network is loaded from; "": it has none
    names_reference: ClassVar[bool] = False  # whether it compares with a picture of editing.references
    reads_image: ClassVar[bool] = True  # whether it compares with the source
    reads_mask: ClassVar[bool] = False  # whether it cannot do without the row's mask

    @abstractmethod
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        """A scalar, at least 0, of pixels (3, H, W), nominally in [-1, 1]. Differentiable."""

    def value_and_grad(self, x0_hat: Tensor, sample: RewardSample) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and its gradient (3, H, W) at an estimate of the clean picture (3, H, W)."""
        with torch.enable_grad():
            pixels = x0_hat.detach().requires_grad_()
            loss = self.loss(pixels, sample)
            (gradient,) = torch.autograd.grad(loss, pixels)
        return loss.detach(), gradient


def reference_of(sample: RewardSample) -> Tensor:
    """The picture that a reward names, (3, h, w).

    Raises:
        PrepareError: it was not brought.
    """
    if sample.reference is None:
        raise PrepareError("a reward compares with a reference picture, and none was brought. Name it in its reference")
    return sample.reference


def mask_of(sample: RewardSample) -> Tensor:
    """(H, W): the row's mask, or ones."""
    return torch.ones(sample.image.shape[-2:]) if sample.mask is None else sample.mask
