"""The recipe's section of attempts: what is tried again, with which seeds and settings, and which attempt is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.settings.sections import Section

if TYPE_CHECKING:
    from pipeline.settings.gates import GatesConfig

Rank = Literal[
    "background_psnr",
    "background_ssim",
    "change_inside",
    "edit_change",
    "clip_sim_dir",
    "clip_sim_1",
    "clip_sim_image",
    "dinov2_sim",
    "judge_overall",
    "denoise_gain",
]
"""Figures of which more is better."""


class Variation(Section):
    """What an attempt does otherwise than the first."""

    scale: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of every concept's guidance_scale."""
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Every concept's threshold; none: its own."""
    inversion: dict[str, Any] = Field(default_factory=dict)
    """Settings of the inversion in place of its own; with `method`, another inversion."""
    editing: dict[str, Any] = Field(default_factory=dict)
    """Settings of the editor in place of its own; with `method`, another editor."""
    new_seed: bool = True
    """Noise of its own; false: that of the first attempt."""


class BestOfConfig(Section):
    """Several attempts at a result: the best that passes every gate goes to `data/`, all others to `rejected/`."""

    attempts: int = Field(ge=2, le=64)
    """Attempts at a result, at most, the first included."""
    until: Literal["pass", "budget"] = "pass"
    """When to stop: with the first attempt that passes every gate, or after all of them."""
    vary: tuple[Variation, ...] = ()
    """What the attempts after the first do otherwise, in turn, beginning anew at its end; none: new seeds alone."""
    rank_by: Rank | None = None
    """Of several that pass, the one with the most of this figure is kept, the earlier of two with as much. None:
    judge_overall where gates name a judge, else clip_sim_dir where they name a CLIP, else denoise_gain, which costs
    network rows."""

    @property
    def variations(self) -> int:
        """Attempts after the first that may differ in more than their seeds."""
        return min(len(self.vary), self.attempts - 1)

    def ranked_by(self, gates: GatesConfig) -> Rank:
        """The figure by which an attempt is chosen among those that pass."""
        by_model: Rank = "clip_sim_dir" if gates.clip is not None else "denoise_gain"
        return self.rank_by or ("judge_overall" if gates.judge is not None else by_model)

    def variation(self, attempt: int) -> Variation | None:
        """What an attempt does otherwise; None for the first.

        Args:
            attempt: its number, from 0.
        """
        if attempt == 0:
            return None
        return self.vary[(attempt - 1) % len(self.vary)] if self.vary else Variation()
