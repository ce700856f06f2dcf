"""What an edit may be made of in product: texts, and rewards. Each is an expert that pulls the image its own way."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pipeline.rewards import REWARDS, Reward

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]
NonEmptyPrompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]

if TYPE_CHECKING:
    AnyReward = Reward
else:  # what pydantic reads: the registry as a tagged union
    AnyReward = Annotated[reduce(or_, REWARDS.values()), Field(discriminator="method")]


class TextExpert(BaseModel):
    """One text of an edit by several (h-Edit, arXiv 2503.02187: a product of h-experts)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    prompt: NonEmptyPrompt
    """What the image shall show as a whole, as a target_prompt does."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of its direction in the sum; 0: it does not act."""
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Strength on the target's side; none: the editor's guidance_scale."""
    threshold: float | None = Field(default=None, ge=0, lt=1)
    """With mask: quantile, the share of the image's area that is left out; none: the editor's mask_threshold."""
