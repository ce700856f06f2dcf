"""Qwen2.5-VL as a text encoder (Bai et al., arXiv 2502.13923): prompts within a fixed conversation, and pictures beside
them.

The conversation's first words tell the model its task; what it makes of these is left out, and the rest is what a
transformer reads. Prompts have a fixed number of places. Those behind a prompt are zeros, which the transformer masks:
how many there are changes results by rounding alone, and texts of any length share calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.copying import to_device
from pipeline.engine.calls import Conditioning, Span
from pipeline.errors import EditError, ModelError
from pipeline.models.flow_transformer import FlowText
from pipeline.models.kernels import exact_float32
from pipeline.models.networks import words_of_tokens

IMAGE_TOKEN = "<|image_pad|>"  # stands where the text model is given what the vision model makes of a picture
FILE = "processor/preprocessor_config.json"
ROUND = 32  # pixels
NO_WORDS = " "  # of an empty prompt: what the publishers sample against


class Conversation(NamedTuple):
    """What stands around a prompt."""

    system: str  # the task; left out of what the transformer reads
    num_system_tokens: int
    before: str = ""  # between the task and the prompt; an `IMAGE_TOKEN` in it is the picture
    behind: str = "<|im_end|>\n<|im_start|>assistant\n"

    def until_prompt(self, image_tokens: int) -> str:
        """All that stands before a prompt, with a picture of so many tokens."""
        return self.system + self.before.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens)


class QwenText(FlowText):
    """Prompts as a transformer reads them, of a tokenizer and an encoder that are loaded.

    Args:
        tokenizer: a fast one.
        encoder: `Qwen2_5_VLForConditionalGeneration`.
        num_places: of a prompt with its ending.
        conversation: around a prompt alone.
        with_picture: around a prompt that speaks of a picture, and how that is cut; None: none is read.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: Any,
        *,
        num_places: int,
        conversation: Conversation,
        with_picture: tuple[Conversation, PictureCut] | None = None,
    ) -> None:
        self.tokenizer, self.encoder, self.num_places = tokenizer, encoder, num_places
        self.conversation, self.with_picture = conversation, with_picture

    @override
    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts in one call.

        Raises:
            EditError: one is longer than its places.
        """
        conversation = self.conversation
        texts = [self._tokens(conversation, prompt, 0) for prompt in prompts]
        ids, there = self._filled([text.ids for text in texts], conversation.num_system_tokens + self.num_places)
        states = self._states(input_ids=ids, attention_mask=there)
        return [
            self._conditioning(prompt, text, one, conversation)
            for prompt, text, one in zip(prompts, texts, states, strict=True)
        ]

    @override
    @torch.no_grad()
    def encode_of(self, prompt: str, picture: np.ndarray) -> Conditioning:
        """Embed a prompt that speaks of a picture (H, W, 3) uint8, alone in its call: its bits depend on both alone.

        Raises:
            EditError: the prompt is longer than its places, or holds a picture's token.
        """
        assert self.with_picture is not None
        conversation, vision = self.with_picture
        patches, (rows, columns) = vision.cut(picture)
        tokens = rows * columns // vision.merge_size**2
        text = self._tokens(conversation, prompt, tokens)
        length = conversation.num_system_tokens + tokens + self.num_places
        ids, there = self._filled([text.ids], length)
        image = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if text.ids.count(image) != tokens:
            raise EditError(f"the prompt holds {IMAGE_TOKEN}, which stands for a picture. Say it without")
        merged = (rows // vision.merge_size, columns // vision.merge_size)
        device, dtype = self.encoder.device, self.encoder.dtype
        (states,) = self._states(
            input_ids=ids,
            attention_mask=there,
            # Told, since diffusers 0.42 with transformers 5 does without: then a picture's tokens stand in one line,
            # which no encoder was trained with (huggingface/diffusers issue 14194).
            position_ids=to_device(positions(text.ids, image, merged, length), device),
            pixel_values=to_device(patches, device).to(dtype),
            image_grid_thw=to_device(torch.tensor([[1, rows, columns]]), device),
        )
        return self._conditioning(prompt, text, states, conversation)

    def _tokens(self, conversation: Conversation, prompt: str, image_tokens: int) -> _Tokens:
        before = conversation.until_prompt(image_tokens)
        found = self.tokenizer(f"{before}{prompt or NO_WORDS}{conversation.behind}", return_offsets_mapping=True)
        ids: list[int] = found.input_ids
        own = len(ids) - conversation.num_system_tokens - image_tokens
        if own > self.num_places:
            raise EditError(
                f"the prompt takes {own} places of the text encoder with what stands around it, and has "
                f"{self.num_places}. Set model.text_tokens to {own} or more (512 at most), or say it shorter"
            )
        offsets = [(first - len(before), last - len(before)) for first, last in found.offset_mapping]
        return _Tokens(ids, [at for at, (first, _) in enumerate(offsets) if 0 <= first < len(prompt)], offsets)

    def _filled(self, texts: Sequence[list[int]], length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, L), filled up behind, and which of them are texts', (B, L)."""
        lengths = torch.tensor([len(ids) for ids in texts])
        ids = torch.tensor([[*ids, *[self.tokenizer.pad_token_id] * (length - len(ids))] for ids in texts])
        there = (torch.arange(length)[None] < lengths[:, None]).long()
        return to_device(ids, self.encoder.device), to_device(there, self.encoder.device)

    def _states(self, *, attention_mask: Tensor, **told: Tensor) -> Tensor:
        """Last states (B, L, D), zeros where no text is. The language model's head, whose answer is thrown away, is
        not asked."""
        with exact_float32(self.encoder.lm_head.weight):
            states: Tensor = self.encoder.model(attention_mask=attention_mask, use_cache=False, **told)[0]
        return states * attention_mask[..., None].to(states.dtype)

    def _conditioning(self, prompt: str, text: _Tokens, states: Tensor, conversation: Conversation) -> Conditioning:
        left_out = conversation.num_system_tokens
        first = text.own[0] if text.own else len(text.ids)
        own = range(first - left_out, first - left_out + len(text.own))
        words = words_of_tokens(prompt, [text.offsets[at] for at in text.own])
        span = Span(0, tuple(text.ids[left_out:]), own, words)
        return Conditioning(prompt, {"embedding": states[left_out:].clone()}, (span,), keeps_norm=True)


class _Tokens(NamedTuple):
    """A whole text's."""

    ids: list[int]
    own: list[int]  # places of the prompt's
    offsets: list[tuple[int, int]]  # where each begins and ends, counted from the prompt's first character


def positions(ids: Sequence[int], image_token: int, merged: tuple[int, int], length: int) -> Int[Tensor, "3 1 L"]:
    """Time, row and column of each of a text's tokens, filled up with zeros to a length (arXiv 2409.12191, section
    2.1): of a word all three are its place. A picture's tokens stand at one time, in rows and columns; what follows
    goes on behind its longer side.

    Args:
        ids: of the text, with one run of image tokens at most.
        image_token: id of such a token.
        merged: rows and columns of them.
        length: L.
    """
    found = torch.zeros((3, 1, length), dtype=torch.long)
    rows, columns = merged
    count = rows * columns
    first = next((at for at, one in enumerate(ids) if one == image_token), len(ids))
    found[:, 0, :first] = torch.arange(first)
    if first < len(ids):
        image = slice(first, first + count)
        found[0, 0, image] = first
        found[1, 0, image] = first + torch.arange(rows).repeat_interleave(columns)
        found[2, 0, image] = first + torch.arange(columns).repeat(rows)
        behind = len(ids) - first - count
        found[:, 0, first + count : len(ids)] = first + max(rows, columns) + torch.arange(behind)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureCut:
    """How a picture is cut for the vision model, as a checkpoint's `preprocessor_config.json` says: brought to sides
    of whole tokens within bounds of its area, normalised, and cut into patches, each there twice as if it were two
    frames of a video."""

    mean: tuple[float, ...]  # per channel, of values in [0, 1]
    std: tuple[float, ...]
    factor: float  # from uint8 to these values
    least: int  # pixels
    most: int
    patch_size: int  # pixels along a patch's side
    merge_size: int  # patches along a token's side
    frames: int
    area: int | None = None  # pixels that a picture is brought to before, in multiples of 32 a side; None: it is not

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> PictureCut:
        """Read a processor's configuration.

        Args:
            config: its file.
            vision: the vision model's.
            where: the checkpoint, for errors.

        Raises:
            ModelError: it leaves out a step that is taken here, or cuts otherwise than the vision model reads.
        """
        for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not config.get(key, True):
                raise ModelError(
                    f"{where} has {key} false in {FILE}, and pictures are read as they were in training. Correct it"
                )
        for ours, theirs, usual in (
            ("patch_size", "patch_size", 14),
            ("merge_size", "spatial_merge_size", 2),
            ("temporal_patch_size", "temporal_patch_size", 2),
        ):
            if (cut := config.get(ours, usual)) != (read := vision.get(theirs, usual)):
                raise ModelError(
                    f"{where} has {ours} {cut!r} in {FILE}, and a vision model of {theirs} "
                    f"{read!r}. Use the processor that the text encoder was trained with"
                )
        size = config.get("size") or {}
        found = cls(
            mean=tuple(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
            std=tuple(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
            factor=config.get("rescale_factor", 1 / 255),
            least=config.get("min_pixels") or size.get("shortest_edge", 56 * 56),
            most=config.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
            patch_size=config.get("patch_size", 14),
            merge_size=config.get("merge_size", 2),
            frames=config.get("temporal_patch_size", 2),
        )
        if len(found.mean) != 3 or len(found.std) != 3 or not 0 < found.least <= found.most:
            raise ModelError(
                f"{where} has image_mean {found.mean}, image_std {found.std} and {found.least} to {found.most} pixels "
                f"in {FILE}, which are no three channels or no bounds of an area. Correct it"
            )
        return found

    @property
    def token_side(self) -> int:
        """Pixels along the side of what is one token of the text model."""
        return self.patch_size * self.merge_size

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what is cut of a picture: its own, or of `area`."""
        if self.area is None:
            return height, width
        across = math.sqrt(self.area * width / height)
        return round(across * height / width / ROUND) * ROUND, round(across / ROUND) * ROUND

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is brought to: the nearest whole tokens, or, out of bounds, the largest area
        below the upper one or the smallest above the lower one of about its shape."""
        side = self.token_side
        rows, columns = (round(one / side) * side for one in (height, width))
        if rows * columns > self.most:
            shrunk = math.sqrt(height * width / self.most)
            rows, columns = (max(side, math.floor(one / shrunk / side) * side) for one in (height, width))
        elif rows * columns < self.least:
            grown = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(one * grown / side) * side for one in (height, width))
        return rows, columns

    def cut(self, picture: np.ndarray) -> tuple[Float[Tensor, "N P"], tuple[int, int]]:
        """Patches of a picture (H, W, 3) uint8, those of a token side by side, and how many rows and columns of them.
        A patch's numbers are ordered by channel, frame, row and column."""
        image = Image.fromarray(picture)
        seen = self.seen(image.height, image.width)
        if self.area is not None:
            image = image.resize(seen[::-1], Image.Resampling.LANCZOS)
        height, width = self.size(*seen)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        scaled = np.asarray(resized, dtype=np.float32) * np.float32(self.factor)
        values: np.ndarray = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        patch, merge = self.patch_size, self.merge_size
        tokens = torch.from_numpy(values).reshape(
            height // self.token_side, merge, patch, width // self.token_side, merge, patch, 3
        )
        patches = tokens.permute(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # (rows, columns, m, m, 3, 1, p, p)
        patches = patches.expand(*patches.shape[:5], self.frames, patch, patch)
        return patches.reshape(-1, 3 * self.frames * patch * patch), (height // patch, width // patch)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture of so many pixels."""
        rows, columns = self.size(*self.seen(height, width))
        return rows * columns // self.token_side**2


def check_qwen(tokenizer: Any, config: Any, conversations: Sequence[Conversation], where: str) -> None:
    """See that a tokenizer and a text encoder's configuration belong together, and to these conversations.

    Raises:
        ModelError: they do not: the places that are left out would be other ones than in training, and no error.
    """
    known, embedded = len(tokenizer), config.text_config.vocab_size
    if not 0.9 * embedded <= known <= embedded:
        raise ModelError(
            f"{where} has a tokenizer of {known} tokens and a text encoder of {embedded}: they were not made for each "
            "other. Use the tokenizer that the encoder was trained with"
        )
    for conversation in conversations:
        count = len(tokenizer(conversation.system).input_ids)
        if count != conversation.num_system_tokens:
            raise ModelError(
                f"{where} has a tokenizer that makes {count} tokens of the words that stand before every prompt, which "
                f"were {conversation.num_system_tokens} in training. Use the tokenizer that the encoder was trained "
                "with"
            )
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if any(IMAGE_TOKEN in one.before for one in conversations) and image != config.image_token_id:
        raise ModelError(
            f"{where} has a tokenizer whose {IMAGE_TOKEN} is {image}, and a text encoder that puts pictures at "
            f"{config.image_token_id}. Use the tokenizer that the encoder was trained with"
        )
