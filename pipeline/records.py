"""What travels: Sample > Asked > Prepared > Trajectory > EditedLatents > Decoded > Edited, or Rejected on the way.

Each record lists exactly what is known by then; none is ever half filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.directions import Direction, StoredDirection
from pipeline.errors import Stage
from pipeline.experts import AnyReward, NonEmptyPrompt, Prompt, TextExpert
from pipeline.interventions import Intervention
from pipeline.placement import Placement
from pipeline.samples import Sample
from pipeline.subjects import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.diffusion.levels import Level, Schedule
    from pipeline.diffusion.steps import Solver
    from pipeline.engine.calls import Conditioning
    from pipeline.engine.controls import Transformer
    from pipeline.engine.halfway import SecondOrder
    from pipeline.engine.pullback import LocalBasis
    from pipeline.interventions import Library
    from pipeline.recordings import Attended, Recorded
    from pipeline.remote.pictures import Spent


class Concept(BaseModel):
    """One thing to add to an image or to take out of it (LEDITS++, arXiv 2311.16711)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    prompt: NonEmptyPrompt
    """What to add or remove, in a few words; any text, known to the model or not."""
    guidance_scale: float = Field(default=5.0, allow_inf_nan=False)
    """Strength; typical 3 to 15, 0: none, negative turns the direction round."""
    threshold: float = Field(default=0.9, ge=0, lt=1)
    """Share of the image's area that is left out; 0.6 to 0.8 for large things, 0.9 to 0.98 for small ones."""
    direction: Literal["add", "remove"] = "add"
    """Whether to bring the concept into the image or to take it out."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start without guidance; more keeps more of the layout."""
    cooldown_steps: int | None = Field(default=None, ge=0)
    """Step at which guidance ends, from 0; none: never. After warmup_steps."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Factor of the masked direction where concepts are summed; 0: the concept does not act."""

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> Concept:
        if self.cooldown_steps is not None and self.cooldown_steps <= self.warmup_steps:
            raise ValueError(
                f"cooldown_steps {self.cooldown_steps} is not after warmup_steps {self.warmup_steps}: the concept "
                "would never act. Raise cooldown_steps, lower warmup_steps, or leave the concept out"
            )
        return self


Window = tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]]
"""A part of the steps, as shares of their number: from (included) and to (not included)."""


class WordPair(BaseModel):
    """Words of the two prompts that name the same place in the image: "cat" and "dog"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    source: tuple[NonEmptyPrompt, ...] = ()
    """Words of the source prompt."""
    target: tuple[NonEmptyPrompt, ...] = ()
    """Words of the target prompt."""


class EditRequest(BaseModel):
    """What to change in one image. How to change it stands in the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    source_prompt: Prompt = ""
    """What the image shows."""
    target_prompt: Prompt = ""
    """What it shall show, for methods that think in two prompts: all but ledits_pp and reconstruct."""
    negative_prompt: Prompt = ""
    """What it shall not show."""
    concepts: tuple[Concept, ...] = ()
    """What to add or remove, for methods that think in directions: ledits_pp."""
    experts: tuple[TextExpert, ...] = ()
    """More texts that act at once, each by its own direction. For h_edit."""
    rewards: tuple[AnyReward, ...] = ()
    """Losses of the image that the edit descends, with texts or without. For h_edit."""
    instruction: Prompt = ""
    """The edit as one would ask a person for it. For instruct, and for those who train on the results. Without one it
    is made of the concepts ("add sunglasses and remove the hat") or prompts (change "a cat" to "a dog")."""
    blend_words: WordPair | None = None
    """What changes. prompt_to_prompt, proxedit, h_edit keep everything outside of where these words attend; masactrl's
    mask auto takes it for the foreground; diffedit and fast_diffedit compare these texts instead of the prompts."""
    subtract_words: WordPair | None = None
    """What stays even inside of where blend_words attend. For prompt_to_prompt, proxedit and h_edit."""
    equalizer: dict[NonEmptyPrompt, float] = Field(default_factory=dict)
    """Factor of a word's attention, by word of the target prompt; 1: unchanged. Read where cross_replace_steps is."""
    cross_replace_steps: dict[NonEmptyPrompt, Window] = Field(default_factory=dict)
    """Window of the steps in which a word's cross-attention is overwritten, by word of the target prompt; others have
    the editor's. For prompt_to_prompt, proxedit and h_edit."""
    direction: Direction | None = None
    """Where riemannian moves the image to, and how far. None: 16 moves along its strongest direction."""
    interventions: tuple[Intervention, ...] = Field(default=(), max_length=64)
    """What concepts writes into the network, and takes out of it."""
    subject: Subject | None = None
    """What consistory keeps the same in all scenes of a set. A scene is an edit, and target_prompt what it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why nothing that is asked of a row can be made."""

    stage: Stage
    error_class: str
    message: str
    attempt: int = 1
    error: Exception | None = field(default=None, compare=False, repr=False)  # see `Rejected`


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row and what is asked of it, found out without a look at its image."""

    sample: Sample
    edits: tuple[str, ...]  # names; those of the job, or "", where the row's own are not known
    requests: Mapping[str, EditRequest] = field(default_factory=dict)  # by edit name; empty where it is refused
    refusal: Refusal | None = None
    attempt: int = 0  # of a run that makes several
    only: frozenset[tuple[str, str]] | None = None  # (edit, method) that are made; None: every edit by every method

    def rejected(self, methods: Iterable[str], refusal: Refusal) -> list[Rejected]:
        """Everything that is asked of it, by all methods, refused for one reason."""
        pairs = [(edit, method) for edit in self.edits for method in methods]
        return [Rejected.by(refusal, self.sample, *pair) for pair in pairs if self.only is None or pair in self.only]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Decoded, checked and at model size."""

    sample: Sample
    original: np.ndarray  # (H, W, 3) uint8, orientation applied, alpha flattened
    pixels: np.ndarray  # (h, w, 3) uint8 at model size; h and w are multiples of what the model needs
    placement: Placement
    mask: np.ndarray | None  # the user's, (h, w) float32 in [0, 1] at model size
    allowed: np.ndarray | None  # (H, W) bool: the user's mask at the original's size, where it is at least half white
    requests: Mapping[str, EditRequest]  # by edit name
    attempt: int = 0  # as those of `Asked`
    only: frozenset[tuple[str, str]] | None = None


class InversionPrompts(NamedTuple):
    """What an inversion predicts from: a prompt, and what that is guided against. Twice the same: no guidance."""

    prompt: str
    negative_prompt: str = ""


UncondScope = Literal["all", "source"]
"""Which branches of an editor take the unconditional embeddings that an inversion brings."""

DrawNoise = Callable[[], "Tensor"]
"""Returns one more standard normal latent (C, h, w) at each call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What an inversion is given: one image, and what is known of it."""

    latents: Tensor  # (C, h, w) encoded image, scaled
    prompt: str  # what the image shows; may be ""
    negative_prompt: str = ""  # what the prompt is guided against; the same as it: no guidance
    schedule: Schedule
    draw_noise: DrawNoise  # the inversion's noise
    editing_noise: Callable[[], DrawNoise]  # an editor's noise, from its beginning: no edit shifts another's
    pixels: np.ndarray | None = None  # (H, W, 3) uint8, the image itself
    mask: np.ndarray | None = None  # (H, W) in [0, 1], the row's own, for what looks at pixels; None: it brings none
    placement: Placement | None = None  # of the image on its canvas; None: it fills the canvas
    seed: int = 0  # of the row and the attempt: what is asked of a server for one is asked for no other
    stored: Mapping[str, Mapping[str, StoredDirection]] = field(default_factory=dict)  # by file and name
    libraries: Mapping[str, Library] = field(default_factory=dict)  # of autoencoders, by folder
    blocks: Mapping[str, Transformer] = field(default_factory=dict)  # of the network, by name
    # Noise of its own for each purpose that an editor names, from its beginning. None: nobody asks for any.
    draws: Callable[[str], DrawNoise] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    def of_image(self, maps: Tensor) -> Tensor:
        """Maps (..., h, w) of the canvas without its padding: what thresholds and means of an image are taken over."""
        if self.placement is None:
            return maps
        rows, columns = self.placement.image_part((maps.shape[-2], maps.shape[-1]))
        return maps[..., rows, columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What an inversion returns: one image as N steps of a sampler, noisiest first.

    `latents[i]` is the latent before step i, which runs at `levels[i]`, and `latents[N]` the encoded image. A step adds
    `noise_maps[i]` times its sigma where there are noise maps.
    """

    method: str  # the inversion that made it
    source: Source
    solver: Solver  # the steps; an editor walks these, and never computes levels of its own
    latents: Tensor  # (N + 1, C, h, w), float32 or wider
    noise_maps: Tensor | None = None  # (N, C, h, w)
    data_preds: Tensor | None = None  # (N, C, h, w) predictions of the clean latents, for multistep solvers
    # (N, C, h, w) velocities that an inversion went up along, by step; None: it tells of none.
    velocities: Tensor | None = None
    second_order: SecondOrder | None = None  # the rule that it was walked by, half-way; None: first order
    # (N, C, h, w) latents that these were predicted at, at the level that each step starts from. None: those below it.
    predicted_at: Tensor | None = None
    source_guidance: float = 1.0
    skipped_steps: int = 0  # steps of the whole schedule that were left out at its noisy end
    level_above: Level | None = None  # that the last of these starts from; None: none was left out
    uncond: tuple[Conditioning, ...] | None = None  # N, one per step, that take the empty prompt's place. None: none
    uncond_scope: UncondScope = "all"  # which rows take `uncond`
    pinned: bool = False  # an editor's source branch is these latents, whatever is predicted for it
    pin_shares: tuple[float, ...] | None = None  # N, of the way back that a pinned source goes each step. None: all

    @property
    def source_prompt(self) -> str:
        """What the image shows; may be ""."""
        return self.source.prompt

    @property
    def keeps_source(self) -> bool:
        """Whether an editor's source branch is these latents throughout, so that nothing need be predicted for it."""
        return self.pinned and self.pin_shares is None

    @property
    def total_steps(self) -> int:
        """S: steps of the whole schedule, those left out included."""
        return self.num_steps + self.skipped_steps

    @property
    def num_steps(self) -> int:
        """N: steps that are walked."""
        return len(self.solver.steps)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The N levels that steps start from, noisiest first."""
        return tuple(step.start for step in self.solver.steps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told at each of them, descending."""
        return tuple(level.timestep for level in self.levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedLatents:
    """What an editor returns."""

    latents: Tensor  # (C, h, w)
    # (E, h, w) bool: the regions that the edit found for itself, one per concept of the request or one in all. E is 0
    # where nothing was edited. None: it found no region, and acted wherever it was let.
    masks: Tensor | None
    recorded: tuple[Recorded | Attended, ...] = ()  # what blocks wrote, where that was asked for

    @property
    def mask(self) -> Tensor | None:
        """Union of the masks, (h, w) bool; None where there are none."""
        return None if self.masks is None or len(self.masks) == 0 else self.masks.any(dim=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedPixels:
    """What an editor returns that makes pictures without the model."""

    pixels: np.ndarray  # (H, W, 3) uint8, of the size of the canvas
    masks: Tensor  # (1, h, w) bool at the latents' size: where they differ from the image
    answer: ServerAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAnswer:
    """Of a result that a server made."""

    model: str  # as the server names it
    spent: Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """One result as it leaves the engine, at model size: what is left to do needs no model, and no waiting GPU."""

    prepared: Prepared
    edit: str
    method: str
    pixels: np.ndarray  # (h, w, 3) uint8, edited
    round_trip: np.ndarray | None  # (h, w, 3) uint8, the input through the autoencoder and back; None: not wanted
    masks: tuple[np.ndarray, ...] | None  # (h, w) bool, as those of `EditedLatents`
    seed: int
    basis: LocalBasis | None = None  # of a run that writes bases; the pixels then show where it lies
    recorded: tuple[Recorded | Attended, ...] = ()  # as that of `EditedLatents`
    edge: int | None = None  # pixels of a latent's side, where it is to be laid on its input by its masks; None: not
    is_compared: bool = True  # whether the result shows the input, changed, so that figures compare the two
    inversion_psnr: float | None = None  # dB, of the trajectory that is replayed without an edit; None: not measured
    stopped: bool = False  # that was too low: the pixels are those of the replay, and nothing was edited
    denoise_gain: float | None = None  # see gating/gain.py; None: not measured, or no texts to compare
    answer: ServerAnswer | None = None  # None: no server made it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """An instruction in a judge's words."""

    text: str  # "" where it gave none
    revision: str  # which judge and which question
    reason: str  # class of why there is none; "" where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """What gates say of a result."""

    figures: Mapping[str, float | str | None]  # their columns: gating/gate.py
    reasons: tuple[str, ...]  # the gates that rejected it, sorted; none: it passed
    instruction: Rewritten | None = None  # of a result that passed; None: nobody was asked for one


@dataclass(frozen=True, slots=True, kw_only=True)
class Edited:
    """One finished result: an image edited in one way by one method."""

    sample: Sample
    edit: str  # name of the edit request
    method: str  # name of the method in the recipe
    request: EditRequest
    image: np.ndarray  # (H, W, 3) uint8 at original size
    original: np.ndarray  # (H, W, 3) uint8, the decoded input
    # (H, W) bool at original size, inside the user's mask; no mask is empty. None: there is no such region.
    masks: tuple[np.ndarray | None, ...]  # those that the method found: one per concept, or one in all
    mask: np.ndarray | None  # their union; the user's mask where the method found none and acted wherever it was let
    seed: int  # of this image's noise
    figures: Mapping[str, float | None]  # see evaluation/metrics.py; empty of a basis
    basis: LocalBasis | None = None
    recorded: tuple[Recorded | Attended, ...] = ()
    inversion_psnr: float | None = None  # as that of `Decoded`
    stopped: bool = False
    denoise_gain: float | None = None
    gated: Gated | None = None  # None: the run has no gates
    answer: ServerAnswer | None = None  # as that of `Decoded`
    attempt: int = 0  # of a run that makes several


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One asked-for result that could not be made."""

    sample: Sample
    edit: str  # "" where the row failed before its edits were known
    method: str
    stage: Stage
    error_class: str
    message: str
    attempt: int = 1
    # What was raised, for who asked in Python. Its traceback holds every array of its frames: jobs let go of it.
    error: Exception | None = field(default=None, compare=False, repr=False)

    @classmethod
    def by(cls, refusal: Refusal, sample: Sample, edit: str, method: str) -> Rejected:
        """One result that is refused."""
        return cls(
            sample=sample,
            edit=edit,
            method=method,
            stage=refusal.stage,
            error_class=refusal.error_class,
            message=refusal.message,
            attempt=refusal.attempt,
            error=refusal.error,
        )


Outcome = Edited | Rejected
