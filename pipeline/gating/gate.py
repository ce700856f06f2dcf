"""One result before its gates: a pure function of the result, run beside the engine where results are encoded.

Cost without a model: about that of one alignment (pipeline/pairs/alignment.py says how much).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt8

from pipeline.evaluation.metrics import BAND_VALUES
from pipeline.pairs.alignment import align
from pipeline.records import Edited, Gated, Rewritten
from pipeline.settings.gain import GAIN
from pipeline.settings.gates import BEFORE_THE_EDIT, JUDGE_GATES, GatesConfig

Columns = Mapping[str, float | str | None]
ALIGNMENT = (
    *("align_dx", "align_dy", "align_sx", "align_sy", "align_rotation"),
    *("align_corner_px", "align_error_px", "align_correlation", "align_shift", "align_scale"),
)
VERDICT = "align_verdict"
JUDGE_TEXTS = (
    *("judge_reason", "judge_reasoning_sc", "judge_reasoning_pq", "judge_model", "judge_model_reported"),
    *("judge_revision", "judge_base_url_host", "judge_protocol", "judge_prompts", "judge_prompt_hash"),
)
"""What a judge says beside its scores: why there are none, its words, and who was asked by which texts."""
PLAIN = 128  # of 255: the grey that stands for a picture that is not kept


class Look(Protocol):
    """What looks at a result through a model. Its figures depend on the result alone."""

    def __call__(self, edited: Edited) -> Columns:
        """Its figures of a result, by column."""


class Gates:
    """The gates of a run.

    Args:
        config: the recipe's section.
        looks: what looks through the models that it names.
        judge: what is paid for by the question, and so asked last, about what passes all else.
        rewrite: says what would have been asked for, of what passes every gate; None: nobody does.
    """

    def __init__(
        self,
        config: GatesConfig,
        looks: Sequence[Look] = (),
        judge: Look | None = None,
        rewrite: Callable[[Edited], Rewritten] | None = None,
    ) -> None:
        self._config, self._looks, self._judge, self._rewrite = config, looks, judge, rewrite

    def __call__(self, edited: Edited) -> Edited:
        """The result with what the gates say of it; its picture is blanked where it may not be kept."""
        if edited.stopped:  # it is no edit: nothing else is to be said of it
            gated = Gated(figures={BEFORE_THE_EDIT: edited.inversion_psnr}, reasons=(BEFORE_THE_EDIT,))
            return replace(edited, gated=gated)
        figures: dict[str, float | str | None] = {
            BEFORE_THE_EDIT: edited.inversion_psnr,
            GAIN: edited.denoise_gain,
            "change_inside": change_inside(edited.original, edited.image, edited.mask),
            **alignment(edited.original, edited.image, edited.mask),
        }
        for look in self._looks:
            figures |= look(edited)
        reasons = rejecting(self._config, {**edited.figures, **figures})
        if self._judge is not None and not reasons:
            figures |= self._judge(edited)
            reasons = rejecting(self._config, {**edited.figures, **figures})
        image = edited.image
        if "nsfw_score" in reasons and not self._config.keep_unsafe:
            image = np.full_like(image, PLAIN)
        instruction = None if self._rewrite is None or reasons else self._rewrite(edited)
        gated = Gated(figures=figures, reasons=reasons, instruction=instruction)
        return replace(edited, image=image, gated=gated)


def columns_of(config: GatesConfig, *, gain: bool) -> dict[str, type]:
    """The columns that gates add to a row, and what they hold.

    Args:
        config: the recipe's section.
        gain: `denoise_gain` is measured.
    """
    looked = [name for need, names in LOOKED.items() if getattr(config, need) is not None for name in names]
    numbers = (BEFORE_THE_EDIT, "change_inside", *((GAIN,) if gain else ()), *ALIGNMENT, *looked)
    texts = (VERDICT, *(JUDGE_TEXTS if config.judge is not None else ()))
    return {**dict.fromkeys(numbers, float), **dict.fromkeys(texts, str)}


LOOKED = {
    "clip": ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"),
    "dinov2": ("dinov2_sim",),
    "safety": ("nsfw_score",),
    "judge": JUDGE_GATES,
}
"""What is measured through the model that a setting names."""


def passes(config: GatesConfig, figures: Columns, name: str) -> bool | None:
    """Whether a result passes a gate; None where it has nothing to be judged by."""
    value = figures.get(name)
    if name in ALIGNMENT and figures.get(VERDICT) in ("unrelated", "misaligned") and value is None:
        return False  # so far off that no number says how far
    return config.gates[name].holds(value) if isinstance(value, (int, float)) else None


def rejecting(config: GatesConfig, figures: Columns) -> tuple[str, ...]:
    """The gates that a result does not pass, sorted by name. A figure that is undefined rejects nothing."""
    return tuple(sorted(name for name in config.gates if passes(config, figures, name) is False))


def change_inside(
    original: UInt8[np.ndarray, "H W 3"], edited: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"] | None
) -> float | None:
    """Mean absolute difference inside the mask, 0..255; None without a mask."""
    if mask is None or not mask.any():
        return None
    total = 0
    rows = max(1, BAND_VALUES // (3 * original.shape[1]))
    for top in range(0, len(original), rows):
        band = slice(top, top + rows)
        inside = mask[band]
        total += int(np.abs(original[band][inside].astype(np.int16) - edited[band][inside]).sum(dtype=np.int64))
    return total / (3 * int(mask.sum()))


def alignment(
    original: UInt8[np.ndarray, "H W 3"], edited: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"] | None
) -> dict[str, float | str | None]:
    """How the background of the result lies on that of the input: columns `align_*`, in pixels and shares."""
    found = align(original, edited, mask)
    columns = found.columns()
    shifts = [abs(one) for one in (found.dx, found.dy) if one is not None]
    scales = [abs(one - 1) for one in (found.sx, found.sy) if one is not None]
    columns["align_shift"], columns["align_scale"] = max(shifts, default=None), max(scales, default=None)
    return columns
