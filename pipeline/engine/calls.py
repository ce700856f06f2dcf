"""The whole vocabulary of a method: what it may yield, and what it gets back.

A method is a generator over one image. It yields these records, the engine answers each of them:

    EncodeText    -> list[Conditioning], one per prompt
    EncodeImage   -> latents (C, h, w)
    Denoise       -> Denoised: predictions (R, C, h, w) and, where asked, attention maps (R, h/4, w/4)
    Product       -> R vectors: the bottleneck's Jacobian times each
    DecodeLatents -> pixels (H, W, 3) uint8
    DecodeGradient -> Valued: a function's value at the decoded pixels, and its gradient at the latents (C, h, w)
    AskServer     -> a picture that a server edited: what a model would else do
    Fork          -> list of results or exceptions, one per child generator

R counts the rows of one call. Rows do not interact and may be packed into different network calls, unless the call has
a control: then they form a group that shares one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.levels import Level, Prediction
from pipeline.engine.controls import PLAIN, Control, Plan, Seen, Where
from pipeline.remote.pictures import PictureQuestion

T = TypeVar("T")


class Span(NamedTuple):
    """How one tokenizer's view of a prompt lies among the keys of cross-attention."""

    start: int  # place of the first of `token_ids`
    token_ids: tuple[int, ...]  # as the tokenizer makes them, with start and end tokens where it has these
    own: range  # which of `token_ids` are the prompt's own, after truncation
    words: tuple[int, ...]  # of each own token, the word of `prompt.split()` that it belongs to

    @property
    def places(self) -> range:
        """Where the own tokens stand among the keys."""
        return range(self.start + self.own.start, self.start + self.own.stop)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Conditioning:
    """What the network is told beside latents and level: one prompt as a bundle of named tensors.

    Equal to itself alone: as long as somebody holds it, the same prompt gives the same object. Methods read where the
    prompt's tokens stand, replace the part that their paper speaks of, and know no more.
    """

    prompt: str
    parts: Mapping[str, Tensor]  # "embedding" (L, D), and what else a family has, such as "pooled" (P,)
    spans: tuple[Span, ...] = ()  # one per tokenizer whose tokens are keys; none where no prompt was encoded
    keeps_norm: bool = False  # whether guidance leaves each image token's velocity as long as it is without: see guide

    @property
    def embedding(self) -> Tensor:
        """(L, D): what cross-attention reads."""
        return self.parts["embedding"]

    @property
    def length(self) -> int:
        """L: keys of cross-attention."""
        return int(self.embedding.shape[0])

    @property
    def num_bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def positions(self) -> tuple[int, ...]:
        """Places of the prompt's own tokens among the L keys."""
        return tuple(place for span in self.spans for place in span.places)

    def places_of(self, words: Container[int]) -> list[int]:
        """Places of the tokens of some words, told by their number in `prompt.split()`."""
        return [
            place for span in self.spans for place, word in zip(span.places, span.words, strict=True) if word in words
        ]

    def telling(self, guidance_scale: float) -> Conditioning:
        """The same prompt with another guidance scale, for a network that is told one; else itself."""
        told = self.parts.get("guidance")
        if told is None or float(told) == guidance_scale:
            return self
        parts = {**self.parts, "guidance": torch.full_like(told, guidance_scale)}
        return replace(self, parts=parts)

    @property
    def is_told_guidance(self) -> bool:
        """Whether the network takes a guidance scale: then one row is a guided prediction already."""
        return "guidance" in self.parts

    def replacing(self, **parts: Tensor) -> Conditioning:
        """The same with other tensors, of no prompt."""
        return replace(self, prompt="", parts={**self.parts, **parts}, spans=())


@dataclass(frozen=True, slots=True)
class EncodeText:
    """Encode prompts. Each distinct prompt is encoded once per worker.

    `picture` is what the prompts speak of. Where the model's text encoder reads pictures (`Offers.reads_pictures`) it
    is read with each of them, and a prompt is encoded once per picture; elsewhere it is left out.
    """

    prompts: tuple[str, ...]
    picture: np.ndarray | None = None  # (H, W, 3) uint8


@dataclass(frozen=True, slots=True)
class EncodeImage:
    """Encode pixels (H, W, 3) uint8 into scaled latents: the posterior's mode, so that nothing is random."""

    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class DecodeLatents:
    """Decode latents (C, h, w) into pixels (H, W, 3) uint8."""

    latents: Tensor


@dataclass(frozen=True, slots=True)
class DecodeGradient:
    """Decode latents (C, h, w), and bring a function's gradient at the pixels back to them through the decoder.

    `function` takes pixels (3, H, W), nominally in [-1, 1], not clipped, float32 or wider on the model's device, to its
    value, a scalar, and its gradient there, like the pixels. It is called for one image at a time: no neighbour has a
    say in its bits. Costs a pass through the decoder and one back, and no network row.
    """

    latents: Tensor
    function: PixelFunction


PixelFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels (3, H, W) to a scalar, and its gradient there."""


@dataclass(frozen=True, slots=True)
class Valued:
    """Answer to `DecodeGradient`."""

    value: float
    gradient: Tensor  # (C, h, w) on the CPU, like the latents


@dataclass(frozen=True, slots=True)
class Denoise:
    """Predict noise and data of R latents.

    `levels` says where each row stands and what the network is told there: the two may differ, as in DDIM inversion.

    `watch` names, per row, the token positions whose cross-attention at a quarter of the latents' side is wanted
    (averaged over heads and over the down and up blocks' layers of that grid, summed over the tokens). An empty
    sequence watches nothing and costs nothing. Watching does not change a prediction. With a control, watch by its
    `Watch` parts.

    `cotangent` asks for gradients too: of a function of each row's prediction with respect to that row's text
    embedding. It takes a prediction (C, h, w) to the function's gradient there, by both halves. It costs two rows more
    per row.
    """

    latents: Tensor  # (R, C, h, w)
    levels: Sequence[Level]  # R
    conditioning: Sequence[Conditioning]  # R
    watch: Sequence[Sequence[int]] | None = None  # R
    control: Control | None = None  # makes a group of the R rows
    # What some networks take beside the latents, by name: "inpaint" (R, 1 + C, h, w), a mask and the masked image;
    # "reference" (R, C, h', w'), latents of an image to read.
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    cotangent: Callable[[Prediction], Prediction] | None = None

    @property
    def cost(self) -> int:
        """Network rows; a backward pass counts as two forward ones."""
        return len(self.levels) * (1 if self.cotangent is None else 3)


@dataclass(frozen=True, slots=True)
class Denoised:
    """Answer to `Denoise`."""

    predictions: Prediction  # (R, C, h, w), whatever the checkpoint puts out
    attention: Tensor | None  # (R, h/4, w/4), zero for rows that watched nothing; None without `watch`
    seen: Seen | None = None  # what the control recorded
    embedding_grads: Tensor | None = None  # (R, L, D) float32 or wider; None without `cotangent`


Mode = Literal["push", "pull"]
"""Of a Jacobian product. push: J v, forward mode; pull: J^T w, reverse mode."""


@dataclass(frozen=True, slots=True)
class Product:
    """Multiply vectors with J, the Jacobian of the network's bottleneck h with respect to R latents.

    h is what the middle of the network puts out, before the decoder: only what leads there is run. J is never formed.
    Rows are independent: several vectors of one image are as many rows. The bottleneck's shape is the model's to say
    (`Bottleneck.shape`).
    """

    latents: Tensor  # (R, C, h, w), where J is taken
    levels: Sequence[Level]  # R
    conditioning: Sequence[Conditioning]  # R
    vectors: Tensor  # push: (R, C, h, w), like the latents; pull: (R, C', h', w'), like the bottleneck
    mode: Mode

    @property
    def cost(self) -> int:
        """Network rows. Twice through the encoder, about two fifths of the network, counts as once through all."""
        return len(self.levels)


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """What the engine makes of the rows of many `Denoise` calls: one call of the model, R rows."""

    latents: Tensor  # (R, C, h, w), on the CPU
    levels: Sequence[Level]  # R
    conditioning: Sequence[Conditioning]  # R
    watch: Tensor | None = None  # (R, S, L) weights of the tokens whose attention is summed, S by the plan
    beside: Mapping[str, Tensor] = field(default_factory=dict)  # (R, ...) by name
    controls: Sequence[tuple[int, Control]] = ()  # first row of each group that is there, and what controls it
    plan: Plan = PLAIN
    group: int = 1  # rows of a group
    cotangents: Sequence[Callable[[Prediction], Prediction]] | None = None  # R
    alike: Sequence[int] | None = None  # R: the first row of the same latents at the same level; None: nobody looked


@dataclass(frozen=True, slots=True)
class NetworkAnswer:
    """What the model answers."""

    predictions: Prediction  # (R, C, h, w)
    attention: Tensor | None = None  # (R, S, h/4, w/4), where watched
    recorded: Mapping[Where, Tensor] = field(default_factory=dict)  # (slots of all groups, C, h', w') by block
    embedding_grads: Tensor | None = None  # (R, L, D)

    def each(self, change: Callable[[Tensor], Tensor]) -> NetworkAnswer:
        """The same with every tensor changed."""
        return NetworkAnswer(
            predictions=self.predictions.both(change),
            attention=None if self.attention is None else change(self.attention),
            recorded={where: change(written) for where, written in self.recorded.items()},
            embedding_grads=None if self.embedding_grads is None else change(self.embedding_grads),
        )


@dataclass(frozen=True, slots=True)
class AskServer:
    """Ask a server for a picture. Seconds or minutes pass, in which other rows' calls go on; it costs no network row.

    Raises AnswerError into the generator where it gives none.
    """

    question: PictureQuestion


@dataclass(frozen=True, slots=True)
class Fork:
    """Run children side by side; one that fails leaves its exception in its place."""

    children: tuple[Steps[Any], ...]


Call = EncodeText | EncodeImage | DecodeLatents | DecodeGradient | Denoise | Product | AskServer | Fork
Steps = Generator[Call, Any, T]
"""A generator over one image: yields calls, receives their answers, returns T."""
