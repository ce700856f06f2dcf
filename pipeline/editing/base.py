"""What an editor is: settings, and one generator that walks a trajectory down to edited latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.editing.problems import Problem, raise_first
from pipeline.engine.calls import Steps
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, InversionPrompts, Trajectory


class Editor(BaseModel, ABC):
    """Turns a trajectory and a request into edited latents. Fields are its settings; a subclass is final."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: str  # its name in EDITORS; a subclass says which

    inversions: ClassVar[frozenset[str] | None] = None  # names of those it can work with; None: all
    paper: ClassVar[str]
    keeps_to_masks: ClassVar[bool] = True  # whether it can leave alone what is outside of a user's mask

    @classmethod
    def fits(cls, inversion: str) -> bool:
        """Whether it can work with the inversion of that name."""
        return cls.inversions is None or inversion in cls.inversions

    def inverts_under(self, request: EditRequest) -> InversionPrompts:
        """Prompts of the trajectory that it reads: the source prompt, unless it starts from another one.

        Where nothing is to be changed the editor must predict what the inversion predicted, or the image is lost.
        """
        return InversionPrompts(request.source_prompt)

    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        """What is wrong between its settings and those of an inversion that it fits, and the way out."""
        yield from ()

    @abstractmethod
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        """Why this editor cannot serve a request, as far as settings and words tell; none: it can.

        Args:
            request: what to change.
            inversion: what comes before.
            caption_follows: the source prompt will be the row's caption: nothing is said of it yet.
        """

    def check(self, request: EditRequest, inversion: Inversion, *, masked: bool = False) -> None:
        """Refuse a request that this editor cannot serve, of a row that may bring a mask.

        Raises:
            PrepareError: says what is missing and how to give it.
        """
        raise_first(self.problems_of_row(request, inversion, masked=masked))

    def problems_of_row(self, request: EditRequest, inversion: Inversion, *, masked: bool) -> Iterator[Problem]:
        """Why a row's request cannot be served; its source prompt is known by now, and whether it brings a mask."""
        yield from self.problems(request, inversion)
        if masked:
            yield from self.mask_problems()

    def mask_problems(self) -> Iterator[Problem]:
        """Why it cannot serve a row that brings a mask."""
        if not self.keeps_to_masks:
            yield Problem(
                f"{self.method} cannot keep to a mask",
                f"{self.method} repaints the whole image and cannot keep to a mask, and the row brings one. Use "
                "editing.method ledits_pp or prompt_to_prompt, or name a source.mask that no row has",
            )

    @abstractmethod
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        """Yield model calls; return the edit of one image.

        Args:
            trajectory: what the inversion returned.
            request: what to change.
            user_mask: (h, w) at latent resolution in [0, 1], or None for everywhere.
        """
