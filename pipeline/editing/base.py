"""What an editor is: settings, and one generator that walks a trajectory down to edited latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.engine.calls import Steps
from pipeline.errors import PrepareError
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, InversionPrompts, Trajectory


class Editor(BaseModel, ABC):
    """Turns a trajectory and a request into edited latents. Fields are its settings; a subclass is final."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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

    def pair_problem(self, inversion: Inversion) -> str | None:
        """What is wrong between its settings and those of an inversion that it fits, and the way out."""
        return None

    @abstractmethod
    def check(self, request: EditRequest, num_steps: int) -> None:
        """Refuse a request that this editor cannot serve.

        Raises:
            PrepareError: says what is missing and how to give it.
        """

    def check_mask(self) -> None:
        """Refuse a user's mask that this editor cannot keep to.

        Raises:
            PrepareError: says what can.
        """
        if not self.keeps_to_masks:
            raise PrepareError(
                f"{self.method} repaints the whole image and cannot keep to a mask, and the row brings one. Use "
                "editing.method ledits_pp or prompt_to_prompt, or name a source.mask that no row has"
            )

    @abstractmethod
    def edit(
        self,
        trajectory: Trajectory,
        request: EditRequest,
        user_mask: Tensor | None = None,
        *,
        keep_history: bool = False,
    ) -> Steps[EditedLatents]:
        """Yield model calls; return the edit of one image.

        Args:
            trajectory: what the inversion returned.
            request: what to change.
            user_mask: (h, w) at latent resolution in [0, 1], or None for everywhere.
            keep_history: also return what every step did.
        """
