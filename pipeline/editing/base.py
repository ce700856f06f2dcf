"""What an editing method is: settings, and one generator that walks a trajectory down to edited latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipeline.editing.problems import Problem, raise_first
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Fork, Steps
from pipeline.engine.pullback import LocalBasis
from pipeline.inversion.base import Demand, Inversion, Provision
from pipeline.recordings import RecordingKey
from pipeline.records import EditedLatents, EditedPixels, EditRequest, InversionPrompts, Trajectory
from pipeline.remote.pictures import PictureServer


class EditingMethod(BaseModel, ABC):
    """Turns a trajectory and a request into edited latents. Fields are its settings; a subclass is final."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: str  # its name in EDITORS; a subclass says which

    needs: ClassVar[frozenset[Provision]] = frozenset()  # of an inversion's trajectory
    takes: ClassVar[frozenset[Demand]] = frozenset()  # what it has for inversions that are wasted without
    paper: ClassVar[str]
    keeps_to_masks: ClassVar[bool] = True  # whether it can leave alone what is outside of a user's mask
    # Settings by which it does not guide, for models that cannot be guided.
    unguided: ClassVar[str] = "editing.guidance_scale: 1 where the method has one"
    shows_input: ClassVar[bool] = True  # whether results show the input, changed: else no figure compares the two
    reads_model: ClassVar[bool] = True  # whether it takes a model: a recipe whose methods do not may go without
    finds_bases: ClassVar[bool] = False  # whether it moves along local latent bases, which a run may write instead

    @classmethod
    def fits(cls, inversion: type[Inversion]) -> bool:
        """Whether it can work with an inversion, and that with it."""
        return cls.needs <= inversion.provides and inversion.demands <= cls.takes

    @property
    def guides(self) -> bool:
        """Whether its predictions are guided away from another prompt."""
        return True

    @property
    def gives(self) -> frozenset[str]:
        """What it gives the network beside the latents, by name."""
        return frozenset()

    @property
    def server(self) -> PictureServer | None:
        """Whom it asks; None: nobody."""
        return None

    @property
    def reads(self) -> str:
        """The file of stored directions that it reads; "": none."""
        return ""

    @property
    def library(self) -> str:
        """The folder of autoencoders that it reads; "": none."""
        return ""

    @property
    def records(self) -> tuple[RecordingKey, ...]:
        """What it records of the network's blocks, beside its edits."""
        return ()

    @property
    def records_attention(self) -> bool:
        """Whether it records where words are attended to."""
        return False

    def composited(self, pixels: np.ndarray, image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """What becomes of decoded pixels (H, W, 3) uint8: they stay, unless the method puts them into the image.

        Args:
            pixels: the decoded edit.
            image: the source, (H, W, 3) uint8.
            mask: the row's own, (H, W) in [0, 1]; None: it brings none.
        """
        return pixels

    def model_problems(self, offers: Offers) -> Iterator[str]:
        """Why it cannot work on a model that offers this, and the way out."""
        if offers.is_absent and self.reads_model:
            yield (
                f"editing.method '{self.method}' reads a model, and model.name none stands for no model. Name one, or "
                "use editing.method endpoint"
            )
            return
        if offers.distilled and self.guides:
            yield (
                f"{offers.distilled}: such a model knows no guidance, which editing.method '{self.method}' uses. Set "
                f"{self.unguided}, or use the checkpoint that it was distilled from"
            )
        if "inpaint" in offers.inputs - self.gives:
            yield (
                "the model is an inpainting checkpoint, which serves fast_diffedit with backend: inpaint alone. Use "
                "that, or a plain text-to-image checkpoint"
            )
        if "inpaint" in self.gives - offers.inputs:
            yield (
                "backend: inpaint needs an inpainting checkpoint, and the model is a plain one. Use backend: masked, "
                "or an inpainting checkpoint"
            )

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
    ) -> Steps[EditedLatents | EditedPixels]:
        """Yield model calls; return the edit of one image.

        Args:
            trajectory: what the inversion returned.
            request: what to change.
            user_mask: (h, w) at latent resolution in [0, 1], or None for everywhere.
        """

    def edit_all(
        self, trajectory: Trajectory, requests: Sequence[EditRequest], user_mask: Tensor | None = None
    ) -> Steps[Sequence[EditedLatents | EditedPixels | Exception]]:
        """Several edits of one image, side by side: of each what came out, or why nothing did.

        A method whose edits have work in common does that once.
        """
        found: list[EditedLatents | EditedPixels | Exception] = yield Fork(
            tuple(self.edit(trajectory, request, user_mask) for request in requests)
        )
        return found

    def bases(self, trajectory: Trajectory, requests: Sequence[EditRequest]) -> Steps[list[LocalBasis | Exception]]:
        """Of each request the local basis that its edit would move along, or why there is none; nothing is edited.

        Of methods that say `finds_bases`: a run that writes bases takes no other.
        """
        raise NotImplementedError(f"{self.method} moves along no local bases")
