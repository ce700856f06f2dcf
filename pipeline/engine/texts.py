"""Prompts: encoded once each as long as anybody holds them, and on a GPU several in one call of the text encoder.

As with pictures, a prompt's bits depend on the size of its batch and not on what else is in it; so a short batch is
filled up with copies. A prompt that is read with a picture goes alone, and is encoded once per picture.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Conditioning
from pipeline.engine.faults import is_out_of_memory

CACHED_PROMPTS = 1024  # kept per worker beside those in use; of Stable Diffusion 1 that is 240 MB
CACHED_BYTES = 2**30  # of theirs, at most: a prompt of FLUX takes 4 MB in bfloat16, and 8 in float32
PROMPTS_PER_CALL = 8  # on a GPU: one prompt is launched kernel by kernel, and leaves it idle between them


class _Text(NamedTuple):
    """What is encoded once."""

    prompt: str
    picture: str = ""  # digest of the one that is read with it; "": none is


@dataclass(slots=True, eq=False)
class _Asker:
    """Who waits for texts, and those that it has already: held here, they are not encoded again."""

    owner: Any
    texts: tuple[_Text, ...]
    found: dict[_Text, Conditioning]

    @property
    def answer(self) -> list[Conditioning] | None:
        """All of them; None where one is missing."""
        found = [self.found.get(text) for text in self.texts]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else None


class Texts:
    """The prompts of an engine.

    Args:
        backbone: encodes them.
        pad: fill short batches up.
    """

    def __init__(self, backbone: Backbone, *, pad: bool) -> None:
        self._backbone, self._pad = backbone, pad
        # A CPU gains nothing from a batch, and would compute for nobody where one is filled up.
        self.per_call = PROMPTS_PER_CALL if backbone.device.type == "cuda" else 1
        # A prompt that somebody still holds is never encoded again: methods tell prompts by identity.
        self._held: WeakValueDictionary[_Text, Conditioning] = WeakValueDictionary()
        self._kept: OrderedDict[_Text, Conditioning] = OrderedDict()
        self._kept_bytes = 0
        self._askers: list[_Asker] = []
        self._missing: dict[_Text, np.ndarray | None] = {}  # with their pictures, in the order of asking

    def __len__(self) -> int:
        return len(self._missing)

    @property
    def has_full(self) -> bool:
        """Whether those that wait fill a batch; one with a picture does."""
        return len(self._missing) >= self.per_call or any(text.picture for text in self._missing)

    def push(
        self, owner: Any, prompts: tuple[str, ...], picture: np.ndarray | None = None
    ) -> list[Conditioning] | None:
        """The prompts, where all are known already; None: `encode` will answer. `picture`: that they speak of."""
        read = picture if picture is not None and self._backbone.offers.reads_pictures else None
        name = "" if read is None else _digest(read)
        asker = _Asker(owner, tuple(_Text(prompt, name) for prompt in prompts), {})
        for text in asker.texts:
            if (conditioning := self._held.get(text)) is not None:
                asker.found[text] = conditioning
                self._keep(text, conditioning)
        if (answer := asker.answer) is not None:
            return answer
        self._askers.append(asker)
        self._missing |= dict.fromkeys((text for text in asker.texts if text not in asker.found), read)
        return None

    def encode(self) -> Iterator[tuple[Any, list[Conditioning] | None, Exception | None]]:
        """Make one call: who has all that it asked for now, or an error in its place.

        Out of memory halves batches for good; another error is repeated by the prompt that is to blame, alone.
        """
        first = next(iter(self._missing))
        plain = (text for text in self._missing if not text.picture)
        batch = [first] if first.picture else list(islice(plain, self.per_call))
        try:
            encoded = self._call(batch)
        except Exception as error:
            if len(batch) == 1:
                yield from self._fail(batch[0], error)
                return
            if is_out_of_memory(error):
                torch.cuda.empty_cache()
                self.per_call = max(1, self.per_call // 2)
                return
            for text in batch:
                try:
                    yield from self._answered([text], self._call([text]))
                except Exception as own:
                    yield from self._fail(text, own)
            return
        yield from self._answered(batch, encoded)

    def drop(self, is_gone: Callable[[Any], bool]) -> None:
        """Forget what owners that are gone asked for."""
        self._forget([asker for asker in self._askers if is_gone(asker.owner)])

    def _call(self, batch: Sequence[_Text]) -> list[Conditioning]:
        prompts = [text.prompt for text in batch]
        if (picture := self._missing.get(batch[0])) is not None:
            return [self._backbone.encode_text_of(prompts[0], picture)]
        filled = [*prompts, *prompts[:1] * (self.per_call - len(batch) if self._pad else 0)]
        return self._backbone.encode_texts(filled)[: len(batch)]

    def _answered(
        self, batch: Sequence[_Text], encoded: Sequence[Conditioning]
    ) -> Iterator[tuple[Any, list[Conditioning], None]]:
        for text, conditioning in zip(batch, encoded, strict=True):
            self._keep(text, conditioning)
            self._missing.pop(text, None)
            for asker in self._askers:
                if text in asker.texts:
                    asker.found[text] = conditioning
        served = [(asker, answer) for asker in self._askers if (answer := asker.answer) is not None]
        self._forget([asker for asker, _ in served])
        yield from ((asker.owner, answer, None) for asker, answer in served)

    def _fail(self, text: _Text, error: Exception) -> Iterator[tuple[Any, None, Exception]]:
        failed = [asker for asker in self._askers if text in asker.texts]
        self._forget(failed)
        yield from ((asker.owner, None, error) for asker in failed)

    def _forget(self, askers: Sequence[_Asker]) -> None:
        self._askers = [asker for asker in self._askers if asker not in askers]
        wanted = {text for asker in self._askers for text in asker.texts if text not in asker.found}
        self._missing = {text: picture for text, picture in self._missing.items() if text in wanted}

    def _keep(self, text: _Text, conditioning: Conditioning) -> None:
        self._held[text] = conditioning
        if text.picture:  # one that is done does not come back: who holds it keeps it
            return
        if (before := self._kept.pop(text, None)) is not None:
            self._kept_bytes -= before.num_bytes
        self._kept[text] = conditioning
        self._kept_bytes += conditioning.num_bytes
        while len(self._kept) > 1 and (len(self._kept) > CACHED_PROMPTS or self._kept_bytes > CACHED_BYTES):
            self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes


def _digest(picture: np.ndarray) -> str:
    """Of its shape and pixels: equal for rows that bring the same picture."""
    return hashlib.sha256(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()
