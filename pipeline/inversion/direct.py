"""Direct Inversion, also called PnP Inversion (Ju et al., arXiv 2310.01506): the source branch stays on its trajectory.

Plain DDIM inversion whose latents are kept and put back after every step of an edit, whatever was predicted for the
source; the target branch is left alone. The paper adds the difference instead, which is the same up to rounding.

Cost: that of `ddim`; where only a part of the difference is put back, an editor must predict the source as well, for up
to two rows more per step. Reconstruction of the source branch: exact, by copying. Memory: 2 N + 1 latents per image.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from pipeline.engine.calls import Steps
from pipeline.inversion.ddim import DDIMInversion
from pipeline.records import Source, Trajectory


class DirectInversion(DDIMInversion):
    """DDIM inversion, pinned."""

    provides: ClassVar = frozenset({"DDIM steps", "path", "faithful source", "upward velocities"})
    demands: ClassVar = frozenset({"source branch"})
    exact: ClassVar = "exactly in the source branch of editors that have one, approximately elsewhere"
    paper: ClassVar = "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code, arXiv 2310.01506"

    method: Literal["direct"] = "direct"  # type: ignore[assignment]  # the tag of the union that recipes are parsed by
    """Direct (PnP) inversion: DDIM inversion, with the source branch put back on its trajectory."""
    offset_scale: float = Field(default=1.0, ge=0, le=1)
    """Share of the source branch's difference from its trajectory that is put back. At 0 this is `ddim`."""
    interval: int = Field(default=1, ge=1)
    """The difference is put back after every so many steps, the first included; 1: after each."""

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        trajectory = yield from super().invert(source)
        return dataclasses.replace(trajectory, pinned=True, pin_shares=self.pin_shares(trajectory.num_steps))

    def pin_shares(self, num_steps: int) -> tuple[float, ...] | None:
        """Share of the difference that is put back, by step; None: all of it at every step."""
        if self.offset_scale == 1.0 and self.interval == 1:
            return None
        return tuple(self.offset_scale if step % self.interval == 0 else 0.0 for step in range(num_steps))
