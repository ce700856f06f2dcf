"""Prompts: encoded once each as long as anybody holds them, and on a GPU several in one call of the text encoder.

As with pictures, a prompt's bits depend on the size of its batch and not on what else is in it; so a short batch is
filled up with copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakValueDictionary

import torch

from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import Conditioning
from pipeline.engine.faults import is_out_of_memory

CACHED_PROMPTS = 1024  # kept per worker beside those in use; of Stable Diffusion 1 that is 240 MB
CACHED_BYTES = 2**30  # of theirs, at most: a prompt of FLUX takes 4 MB in bfloat16, and 8 in float32
PROMPTS_PER_CALL = 8  # on a GPU: one prompt is launched kernel by kernel, and leaves it idle between them


@dataclass(slots=True, eq=False)
class _Asker:
    """Who waits for prompts, and those that it has already: held here, they are not encoded again."""

    owner: Any
    prompts: tuple[str, ...]
    found: dict[str, Conditioning]

    @property
    def answer(self) -> list[Conditioning] | None:
        """All of them; None where one is missing."""
        found = [self.found.get(prompt) for prompt in self.prompts]
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
        self._held: WeakValueDictionary[str, Conditioning] = WeakValueDictionary()
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._kept_bytes = 0
        self._askers: list[_Asker] = []
        self._missing: dict[str, None] = {}  # in the order in which they were asked for

    def __len__(self) -> int:
        return len(self._missing)

    @property
    def has_full(self) -> bool:
        """Whether those that wait fill a batch."""
        return len(self._missing) >= self.per_call

    def push(self, owner: Any, prompts: tuple[str, ...]) -> list[Conditioning] | None:
        """The prompts, where all are known already; None: `encode` will answer."""
        asker = _Asker(owner, prompts, {})
        for prompt in prompts:
            if (conditioning := self._held.get(prompt)) is not None:
                asker.found[prompt] = conditioning
                self._keep(conditioning)
        if (answer := asker.answer) is not None:
            return answer
        self._askers.append(asker)
        self._missing |= dict.fromkeys(prompt for prompt in prompts if prompt not in asker.found)
        return None

    def encode(self) -> Iterator[tuple[Any, list[Conditioning] | None, Exception | None]]:
        """Make one call: who has all that it asked for now, or an error in its place.

        Out of memory halves batches for good; another error is repeated by the prompt that is to blame, alone.
        """
        batch = list(islice(self._missing, self.per_call))
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
            for prompt in batch:
                try:
                    yield from self._answered(self._call([prompt]))
                except Exception as own:
                    yield from self._fail(prompt, own)
            return
        yield from self._answered(encoded)

    def drop(self, is_gone: Callable[[Any], bool]) -> None:
        """Forget what owners that are gone asked for."""
        self._forget([asker for asker in self._askers if is_gone(asker.owner)])

    def _call(self, batch: Sequence[str]) -> list[Conditioning]:
        filled = [*batch, *[batch[0]] * (self.per_call - len(batch) if self._pad else 0)]
        return self._backbone.encode_texts(filled)[: len(batch)]

    def _answered(self, encoded: Sequence[Conditioning]) -> Iterator[tuple[Any, list[Conditioning], None]]:
        for conditioning in encoded:
            self._keep(conditioning)
            self._missing.pop(conditioning.prompt, None)
            for asker in self._askers:
                if conditioning.prompt in asker.prompts:
                    asker.found[conditioning.prompt] = conditioning
        served = [(asker, answer) for asker in self._askers if (answer := asker.answer) is not None]
        self._forget([asker for asker, _ in served])
        yield from ((asker.owner, answer, None) for asker, answer in served)

    def _fail(self, prompt: str, error: Exception) -> Iterator[tuple[Any, None, Exception]]:
        failed = [asker for asker in self._askers if prompt in asker.prompts]
        self._forget(failed)
        yield from ((asker.owner, None, error) for asker in failed)

    def _forget(self, askers: Sequence[_Asker]) -> None:
        self._askers = [asker for asker in self._askers if asker not in askers]
        wanted = {prompt for asker in self._askers for prompt in asker.prompts if prompt not in asker.found}
        self._missing = {prompt: None for prompt in self._missing if prompt in wanted}

    def _keep(self, conditioning: Conditioning) -> None:
        if (before := self._kept.pop(conditioning.prompt, None)) is not None:
            self._kept_bytes -= before.num_bytes
        self._held[conditioning.prompt] = self._kept[conditioning.prompt] = conditioning
        self._kept_bytes += conditioning.num_bytes
        while len(self._kept) > 1 and (len(self._kept) > CACHED_PROMPTS or self._kept_bytes > CACHED_BYTES):
            self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes
