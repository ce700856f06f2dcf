"""FastDiffEdit: the mask of DiffEdit (arXiv 2210.11427) from more draws, dilated, and inpainting inside of it.

After `noise` the image needs no inversion: the region is repainted from pure noise, by an inpainting UNet or by the
plain one. After `ddim` or `direct` it is DiffEdit with another mask.

Cost: K rows for each text that is compared, in one go, then two rows per step (one at guidance 1), none where the mask
is empty. Masks: one. Memory: N + 1 latents per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.editing.diffedit import DiffEdit
from pipeline.engine.calls import EncodeImage, Steps
from pipeline.errors import EditError
from pipeline.inversion.base import Inversion
from pipeline.records import Trajectory

GREY = 127  # 0 in the autoencoder's range of -1 to 1, as near as uint8 comes


class FastDiffEdit(DiffEdit):
    """DiffEdit with more draws, a dilated mask, and inpainting."""

    needs: ClassVar = frozenset({"DDIM steps"})

    method: Literal["fast_diffedit"] = "fast_diffedit"  # type: ignore[assignment]  # tag of the union
    """Fast DiffEdit: DiffEdit with more draws, a dilated mask, and inpainting."""
    num_maps: int = Field(default=20, ge=1)
    """K: draws of noise that the mask is averaged over."""
    dilate: int = Field(default=1, ge=0)
    """How often a computed mask is dilated by a square of 3 x 3 latent pixels."""
    backend: Literal["masked", "inpaint"] = "masked"
    """Who fills the mask: the plain model, or an inpainting checkpoint, whose UNet is also given mask and masked
    image."""

    @property
    @override
    def gives(self) -> frozenset[str]:
        return frozenset({"inpaint"} if self.backend == "inpaint" else ())

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        """An inpainting UNet cannot invert: it is given a region to repaint, and there is none yet."""
        if self.backend == "inpaint" and inversion.method != "noise":
            yield (
                "backend: inpaint repaints from noise with an inpainting checkpoint, which inversion.method "
                f"'{inversion.method}' cannot run on. Set inversion.method: noise, or backend: masked"
            )
        yield from super().pair_problems(inversion)

    @override
    def beside(self, trajectory: Trajectory, mask: Tensor) -> Steps[dict[str, Tensor]]:
        """Mask, and latents of the image with the mask greyed out.

        To find the mask everything is masked, which leaves the UNet to the latents and the text alone.
        """
        if self.backend == "masked":
            return {}
        pixels = trajectory.source.pixels
        if pixels is None:
            raise EditError("backend: inpaint reads the image's pixels, and the source has none. Set Source.pixels")
        scale = pixels.shape[0] // mask.shape[0]
        repainted = mask.numpy().repeat(scale, axis=0).repeat(scale, axis=1)
        latents = yield EncodeImage(np.where(repainted[..., None], np.uint8(GREY), pixels))
        return {"inpaint": torch.cat([mask[None].to(latents), latents])}
