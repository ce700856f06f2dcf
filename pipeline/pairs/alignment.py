"""Does the background of a result lie on the background of its input? Shift, zoom, stretch and turn, in pixels.

The model: content at (x, y) of the input is found in the result at c + S (x - c) + t, c being the centre. It is
fitted to the luma outside the edit, from coarse to fine (`affine.py`); gain and offset of the brightness do not matter.
Without a mask the half of the blocks that agrees best is taken for what the edit left alone.

Verdicts go by the corner of the image that moved most: a shift of half a pixel is undecided or worse, and so is a zoom
of 0.2 % at 512 pixels, or of 0.4 % at 256. A fit whose error could turn the verdict is `undetermined`.

Cost: about 0.12 s for a pair of 512 x 512 on one core, 0.05 s for 256 x 256; no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from pipeline.pairs.affine import Map, blur, correlation, identity, phase_shift, refine, resized, scaling

Verdict = Literal["aligned", "misaligned", "undecided", "undetermined", "unrelated"]
SIDE = 512  # pixels of the longer side that is worked at, at most; displacements are in pixels of that size
SAME_ASPECT = 0.01  # further apart, no resizing lays one on the other
ALIGNED, MISALIGNED = 0.4, 0.6  # pixels that the furthest corner moved; between them nothing is decided
SURE = 2.0  # standard errors by which a verdict must hold
MARGIN = 8  # pixels around a mask where its edit bleeds
FEWEST = 0.05  # share of the image that must be left outside of the edit
TEXTURE = 2e-6  # smaller eigenvalue of the mean structure tensor of the luma (0..1): plain areas are below
ONE_WAY = 0.01  # smaller eigenvalue as a share of the larger one: stripes are below
RELATED = 0.8  # correlation of the input and of the result that is laid on it
ALIKE = 0.7  # the same of their texture alone: unrelated photographs stay below 0.55, heavy noise above 0.9
HOPELESS = 0.4  # the same, of the coarsest pictures: nothing finer is tried
LOOSE = 1.0  # pixels of standard error: such a map was bent to some blocks
LARGEST_SCALE, LARGEST_SHIFT = 0.3, 0.25  # of a fit that is believed; the shift as a share of the longer side
COARSEST = 48  # pixels of the shorter side of the coarsest picture, at least
SIGMA = 1.0  # pixels of the blur at each size: evens out what JPEG and resampling do
SETTLED = 0.8  # the same, with which no other start is tried
MIRROR_IMAGE = 0.9  # the same, of a mirror image
MIRRORED = 2.0  # pixels of the coarsest pictures that a mirror image may be displaced by
SHADE = 8  # pixels, at each size: slower changes are of light, not of texture, and are taken off before a fit
SCALES = (0.8, 0.9, 1.0, 1.11, 1.25)  # tried where the correlation is weak
BLOCK = 32  # pixels, at full size
NEAR_BEST = (
    0.9  # of the correlation of the best blocks: where most of what has texture was edited, the middle one was, too
)
STEPS = 12  # at each size, at most
COARSE_STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How a result lies on its input. Numbers are None where they could not be found."""

    verdict: Verdict
    note: str = ""  # why: "aspect", "texture", "mask", "error", "mirrored"
    dx: float | None = None  # pixels of the input at working size, to the right
    dy: float | None = None  # down
    sx: float | None = None  # 1 = not scaled
    sy: float | None = None
    rotation: float | None = None  # degrees, clockwise on the screen
    corner_px: float | None = None  # the largest displacement of a corner
    error_px: float | None = None  # standard error of the corner that is known worst
    correlation: float | None = None  # of both lumas outside of the edit, after the fit

    def columns(self) -> dict[str, float | str | None]:
        """As columns of a row."""
        numbers = ("dx", "dy", "sx", "sy", "rotation", "corner_px", "error_px", "correlation")
        return {**{f"align_{name}": getattr(self, name) for name in numbers}, "align_verdict": self.verdict}


def align(
    source: UInt8[np.ndarray, "H W 3"],
    edited: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "H W"] | None = None,
) -> Alignment:
    """Lay a result on its input.

    Args:
        source: the input.
        edited: the result; of another size it is resized, where its aspect ratio is the same within 1 %.
        mask: where the edit may change anything; None where that is not known.
    """
    (height, width), other = source.shape[:2], edited.shape[:2]
    if abs(math.log((width / height) / (other[1] / other[0]))) > SAME_ASPECT:
        return Alignment(verdict="misaligned", note="aspect")
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    one, two = resized(_luma(source), size), resized(_luma(edited), size)
    support = torch.ones(size) if mask is None else _outside(mask, size)
    if float(support.mean()) < FEWEST:
        return Alignment(verdict="undetermined", note="mask")
    if not _has_texture(one, support):
        return Alignment(verdict="undetermined", note="texture")
    levels = [_Level(one, two, support, by_blocks=mask is None, block=BLOCK)]
    while min(levels[0].one.shape) >= 2 * COARSEST:
        levels.insert(0, levels[0].half())
    if levels[0].is_mirrored():
        return Alignment(verdict="unrelated", note="mirrored")
    found = _found(levels)
    return Alignment(verdict="unrelated") if found is None else _judged(found, levels[-1])


def _found(levels: list[_Level]) -> Map | None:
    """From coarse to fine; None where the pictures do not correlate."""
    found = levels[0].start()
    if found is None or levels[0].score(found) < HOPELESS:
        return None
    for before, level in zip([None, *levels[:-1]], levels, strict=True):
        start = found if before is None else found.rescaled(before.size, level.size)
        is_last = level is levels[-1]
        found = level.refine(start, with_error=is_last and not level.by_blocks)
        if found is not None and is_last and level.by_blocks:  # once more, on the blocks that agree under this map
            found = level.refine(found, with_error=True)
        if found is None:
            return None
    return found


def _judged(found: Map, level: _Level) -> Alignment:
    height, width = level.size
    correlated = level.likeness(found)
    scaled, shifted = max(abs(found.sx - 1), abs(found.sy - 1)), max(abs(found.dx), abs(found.dy))
    alike = level.score(found) >= ALIKE and correlated >= RELATED
    if not alike or found.error > LOOSE or scaled > LARGEST_SCALE or shifted > LARGEST_SHIFT * max(level.size):
        return Alignment(verdict="unrelated", correlation=correlated)
    moved, error = found.corner(height, width), found.error
    low, high = moved - SURE * error, moved + SURE * error
    if (moved <= ALIGNED and high > MISALIGNED) or (moved >= MISALIGNED and low < ALIGNED):
        verdict: Verdict = "undetermined"
    else:
        # What may be 0.4 pixels within its error is not passed: 0.2 % of zoom at 288 pixels moves the corner by 0.406.
        verdict = "aligned" if moved + error < ALIGNED else "misaligned" if moved > MISALIGNED else "undecided"
    return Alignment(
        verdict=verdict,
        note="error" if verdict == "undetermined" else "",
        dx=found.dx,
        dy=found.dy,
        sx=found.sx,
        sy=found.sy,
        rotation=found.rotation,
        corner_px=moved,
        error_px=error,
        correlation=correlated,
    )


class _Level:
    """Both pictures at one size, smoothed."""

    def __init__(self, one: Tensor, two: Tensor, support: Tensor, *, by_blocks: bool, block: int) -> None:
        self._raw = one, two
        self.one, self.two = blur(one, SIGMA), blur(two, SIGMA)
        # Around a mask the means would hold the edit; there a ramp of light is all that the fit takes off.
        self.fine_one, self.fine_two = (
            _without_shades(smooth) if by_blocks else smooth for smooth in (self.one, self.two)
        )
        self.support, self.by_blocks, self.block = support, by_blocks, block
        self.size: tuple[int, int] = (one.shape[0], one.shape[1])

    def half(self) -> _Level:
        size = (round(self.size[0] / 2), round(self.size[1] / 2))
        one, two, support = (resized(each, size) for each in (*self._raw, self.support))
        return _Level(one, two, support, by_blocks=self.by_blocks, block=max(8, self.block // 2))

    def is_mirrored(self) -> bool:
        """Whether the other picture's mirror image lies on this one, and it itself does not."""
        if self.score(self.refine(identity(), COARSE_STEPS)) >= MIRROR_IMAGE:
            return False
        one, two = self._raw
        mirrored = _Level(one, two.flip(1), self.support, by_blocks=self.by_blocks, block=self.block)
        found = mirrored.refine(identity(), COARSE_STEPS)
        return found is not None and mirrored.score(found) >= MIRROR_IMAGE and found.corner(*self.size) < MIRRORED

    def start(self) -> Map | None:
        """Nothing moved, where that fits; else the best of several scales with phase correlation's shift."""
        plain = self.refine(identity(), COARSE_STEPS)
        if self.score(plain) >= SETTLED:
            return plain
        found = [plain]
        for scale in SCALES:
            laid, _ = scaling(scale).warp(self.two)
            across, down = phase_shift(self.one, laid, self.support)
            found.append(self.refine(scaling(scale, (scale * across, scale * down)), COARSE_STEPS))
        return max(found, key=self.score)

    def refine(self, start: Map, steps: int = STEPS, *, with_error: bool = False) -> Map | None:
        return refine(self.fine_one, self.fine_two, self._weight(start), start, steps, with_error=with_error)

    def score(self, found: Map | None) -> float:
        """Correlation of the texture under a map, without a mask on the better half of the blocks; -1 for no map."""
        if found is None:
            return -1.0
        warped, inside = found.warp(self.fine_two)
        return correlation(self.fine_one, warped, self._weight(found, sharply=False) * inside)

    def likeness(self, found: Map) -> float:
        """Correlation of the lumas under a map."""
        warped, inside = found.warp(self.two)
        return correlation(self.one, warped, self._weight(found) * inside)

    def _weight(self, found: Map, *, sharply: bool = True) -> Tensor:
        """Where the pictures are to agree: outside of the mask, or on the textured blocks that do so at least as well
        as the middle one; `sharply`: of these on those that come near the best, since most of what has texture may
        have been edited. Each block counts alike, else the edit may be all that has contrast."""
        if not self.by_blocks:
            return self.support
        warped, inside = found.warp(self.fine_two)
        agreed, textured, power = _blocks(self.fine_one, warped, inside.float(), self.block)
        if int(textured.sum()) < 4:
            return self.support
        middle, fourth, best = agreed[textured].quantile(torch.tensor([0.5, 0.75, 0.9])).tolist()
        kept = textured & (agreed >= (max(middle, min(fourth, NEAR_BEST * best)) if sharply else middle))
        votes = torch.where(kept, 1 / power.clamp(min=1e-6), torch.zeros_like(power))
        votes = votes / votes.max()
        whole = votes.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        return whole[: self.size[0], : self.size[1]]


def _blocks(one: Tensor, other: Tensor, inside: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block: the correlation, whether there is enough texture to tell, the mean variance of both."""
    bottom, right = -one.shape[0] % block, -one.shape[1] % block
    values = torch.stack([inside, one, other, one * one, other * other, one * other]) * inside
    means = avg_pool2d(pad(values, (0, right, 0, bottom)), block)
    count = means[0].clamp(min=1e-6)
    mean_one, mean_other, square_one, square_other, both = (means[1:] / count).unbind()
    var_one, var_other = (square_one - mean_one**2).clamp(min=0), (square_other - mean_other**2).clamp(min=0)
    textured = (var_one > TEXTURED) & (means[0] > 0.25)
    agreed = (both - mean_one * mean_other) / (var_one * var_other).sqrt().clamp(min=TEXTURED)
    return agreed, textured, (var_one + var_other) / 2


TEXTURED = 4e-5  # variance of a block's luma (0..1): 1.6 of 255 is the root


def _outside(mask: Bool[np.ndarray, "H W"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """1 where nothing may have changed, at working size."""
    inside = (resized(torch.from_numpy(mask.astype(np.float32)), size) > 0.02).float()
    # Along one axis and then the other: a square at once takes ten times as long.
    across = max_pool2d(inside[None, None], (1, 2 * MARGIN + 1), stride=1, padding=(0, MARGIN))
    return 1 - max_pool2d(across, (2 * MARGIN + 1, 1), stride=1, padding=(MARGIN, 0))[0, 0]


def _has_texture(image: Float[Tensor, "h w"], support: Float[Tensor, "h w"]) -> bool:
    """Whether it varies in two directions, by the mean structure tensor: of stripes one eigenvalue is nearly zero."""
    down, across = torch.gradient(_without_shades(blur(image, 1.5)))
    xx, xy, yy = (float((one * support).sum() / support.sum()) for one in (across**2, across * down, down**2))
    mean, half = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
    return mean - half >= max(TEXTURE, ONE_WAY * (mean + half))


def _without_shades(image: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Less its mean over some pixels around."""
    size = (-(-image.shape[0] // SHADE), -(-image.shape[1] // SHADE))
    shades = blur(resized(image, size), 0.7)
    return image - interpolate(shades[None, None], size=image.shape, mode="bilinear", align_corners=False)[0, 0]


def _luma(pixels: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "H W"]:
    """ITU-R BT.601 luma, 0..1."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    return torch.from_numpy(pixels.astype(np.float32) @ weights)
