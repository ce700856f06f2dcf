"""The whole vocabulary of a method: what it may yield, and what it gets back.

A method is a generator over one image. It yields these records, the engine answers each of them:

    EncodeText    -> list[TextConditioning], one per prompt
    EncodeImage   -> latents (C, h, w)
    Denoise       -> Denoised: noise predictions (R, C, h, w) and, where asked, attention maps (R, h/4, w/4)
    DecodeLatents -> pixels (H, W, 3) uint8
    Fork          -> list of results or exceptions, one per child generator

R counts the rows of one call. Rows do not interact and may be packed into different network calls, unless the call has
a control: then they form a group that shares one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from pipeline.engine.controls import PLAIN, Control, Plan, Seen, Where

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextConditioning:
    """One prompt as the network reads it. Opaque to methods but for its tokens."""

    prompt: str
    embedding: Tensor  # (L, D)
    token_count: int  # tokens of the prompt itself: without start, end and padding, after truncation to L - 2
    token_ids: tuple[int, ...] = ()  # start, the prompt's own, end
    token_words: tuple[int, ...] = ()  # of each own token, the word of `prompt.split()` that it belongs to

    @property
    def positions(self) -> range:
        """Places of the prompt's own tokens among the L keys of cross-attention; place 0 is the start token."""
        return range(1, 1 + self.token_count)


@dataclass(frozen=True, slots=True)
class EncodeText:
    """Encode prompts. Each distinct prompt is encoded once per worker."""

    prompts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EncodeImage:
    """Encode pixels (H, W, 3) uint8 into scaled latents: the posterior's mode, so that nothing is random."""

    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class DecodeLatents:
    """Decode latents (C, h, w) into pixels (H, W, 3) uint8."""

    latents: Tensor


@dataclass(frozen=True, slots=True)
class Denoise:
    """Predict the noise of R latents.

    `watch` names, per row, the token positions whose cross-attention at a quarter of the latents' side is wanted
    (averaged over heads and over the down and up blocks' layers of that grid, summed over the tokens). An empty
    sequence watches nothing and costs nothing. Watching does not change a prediction. With a control, watch by its
    `Watch` parts.

    `cotangent` asks for gradients too: of a function of each row's prediction with respect to that row's text
    embedding. It takes a prediction (C, h, w) to the function's gradient there, (C, h, w). It costs two rows more
    per row.
    """

    latents: Tensor  # (R, C, h, w)
    timesteps: Sequence[int]  # R, what the network is told
    conditioning: Sequence[TextConditioning]  # R
    watch: Sequence[Sequence[int]] | None = None  # R
    control: Control | None = None  # makes a group of the R rows
    inpaint: Tensor | None = None  # (R, 1 + C, h, w): mask and masked image, for networks that take these, too
    cotangent: Callable[[Tensor], Tensor] | None = None

    @property
    def cost(self) -> int:
        """Network rows; a backward pass counts as two forward ones."""
        return len(self.timesteps) * (1 if self.cotangent is None else 3)


@dataclass(frozen=True, slots=True)
class Denoised:
    """Answer to `Denoise`."""

    noise_preds: Tensor  # (R, C, h, w), epsilon whatever the checkpoint predicts
    attention: Tensor | None  # (R, h/4, w/4), zero for rows that watched nothing; None without `watch`
    seen: Seen | None = None  # what the control recorded
    embedding_grads: Tensor | None = None  # (R, L, D) float32 or wider; None without `cotangent`


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """What the engine makes of the rows of many `Denoise` calls: one call of the model, R rows."""

    latents: Tensor  # (R, C, h, w), on the CPU
    timesteps: Sequence[int]  # R
    embeddings: Sequence[Tensor]  # R of (L, D)
    watch: Tensor | None = None  # (R, S, L) weights of the tokens whose attention is summed, S by the plan
    inpaint: Tensor | None = None  # (R, 1 + C, h, w)
    controls: Sequence[tuple[int, Control]] = ()  # first row of each group that is there, and what controls it
    plan: Plan = PLAIN
    group: int = 1  # rows of a group
    cotangents: Sequence[Callable[[Tensor], Tensor]] | None = None  # R


@dataclass(frozen=True, slots=True)
class NetworkAnswer:
    """What the model answers."""

    noise_preds: Tensor  # (R, C, h, w), epsilon
    attention: Tensor | None = None  # (R, S, h/4, w/4), where watched
    recorded: Mapping[Where, Tensor] = field(default_factory=dict)  # (slots of all groups, C, h', w') by block
    embedding_grads: Tensor | None = None  # (R, L, D)


@dataclass(frozen=True, slots=True)
class Fork:
    """Run children side by side; one that fails leaves its exception in its place."""

    children: tuple[Steps[Any], ...]


Call = EncodeText | EncodeImage | DecodeLatents | Denoise | Fork
Steps = Generator[Call, Any, T]
"""A generator over one image: yields calls, receives their answers, returns T."""
