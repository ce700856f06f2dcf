"""Direct Inversion, also called PnP Inversion (Ju et al., arXiv 2310.01506): the source branch stays on its trajectory.

Plain DDIM inversion whose latents are kept and put back after every step of an edit, whatever was predicted for the
source; the target branch is left alone. The paper adds the difference instead, which is the same up to rounding.

Cost: that of `ddim`. Reconstruction of the source branch: exact, by copying. Memory: N + 1 latents per image.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pipeline.engine.calls import Steps
from pipeline.inversion.ddim import DDIMInversion
from pipeline.records import Source, Trajectory


class DirectInversion(DDIMInversion):
    """DDIM inversion, pinned."""

    exact: ClassVar = "exactly in the source branch of editors that have one, approximately elsewhere"
    paper: ClassVar = "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code, arXiv 2310.01506"

    method: Literal["direct"] = "direct"  # type: ignore[assignment]  # the tag of the union that recipes are parsed by

    def invert(self, source: Source) -> Steps[Trajectory]:
        """See `Inversion`."""
        trajectory = yield from super().invert(source)
        return dataclasses.replace(trajectory, pinned=True)
