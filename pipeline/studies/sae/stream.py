"""Batches of recorded vectors in an order that seed and rows decide alone: the same for any number of workers, and
after any resume.

Units are taken in a random order, several at a time; the vectors of these are shuffled together and cut into batches.
Memory: two parts of `shuffle_vectors`, of each autoencoder that is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import SinkError
from pipeline.recordings import RecordingKey
from pipeline.studies.sae.config import TrainingSettings
from pipeline.studies.sae.recorded import Part, RecordedRuns

Vectors = dict[RecordingKey, Tensor]
"""(n, D) of each autoencoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where the stream is."""

    epoch: int = 0
    units: int = 0  # of the epoch's order, before the part at work
    batches: int = 0  # of that part, done


def is_held_out(image_id: str, share: float) -> bool:
    """Whether an image is kept for figures. It depends on the id alone."""
    digest = hashlib.sha256(b"held out\x1f" + image_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def order_of(count: int, seed: int, *place: int) -> Tensor:
    """A random order of `count` things, for one place of the stream."""
    text = "\x1f".join(map(str, (seed, *place)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.randperm(count, generator=torch.Generator().manual_seed(number))


class VectorStream:
    """The vectors of some runs, for several autoencoders at once: each column of a unit is read once.

    Args:
        runs: what was recorded.
        keys: of the autoencoders.
        settings: order, sizes, held out images.
    """

    def __init__(self, runs: RecordedRuns, keys: Sequence[RecordingKey], settings: TrainingSettings) -> None:
        self.runs, self.keys, self.settings = runs, keys, settings

    def batches(self, cursor: Cursor) -> Iterator[tuple[Cursor, Vectors]]:
        """Batches from a place on, without end, each with the place behind it.

        Raises:
            SinkError: there are fewer vectors than one batch.
        """
        size = self.settings.batch_size
        while True:
            order = order_of(len(self.runs.parts), self.settings.seed, cursor.epoch).tolist()
            while cursor.units < len(order):
                taken, vectors = self.part(cursor.epoch, order, cursor.units)
                count = self.count(vectors) // size
                if not count:  # only where all units together are less than a batch, see `part`
                    raise SinkError(
                        f"the recordings hold {self.count(vectors)} vectors to learn from, and a batch has {size}. "
                        "Collect more images or positions, or lower training.batch_size"
                    )
                for number in range(cursor.batches, count):
                    here = slice(number * size, (number + 1) * size)
                    cursor = replace(cursor, batches=number + 1)
                    yield cursor, {key: one[here] for key, one in vectors.items()}
                cursor = Cursor(epoch=cursor.epoch, units=cursor.units + taken)
            cursor = Cursor(epoch=cursor.epoch + 1)

    def part(self, epoch: int, order: Sequence[int], start: int) -> tuple[int, Vectors]:
        """How many units from one on are shuffled together, and their vectors: all that are left, where these are less
        than half a part, so that none is too small for a batch."""
        most = self.settings.shuffle_vectors
        some: dict[RecordingKey, list[Tensor]] = {key: [] for key in self.keys}
        taken, count, ahead = 0, 0, len(order) - start
        while taken < ahead:
            found = self._of_unit(self.runs.parts[order[start + taken]])
            for key, one in found.items():
                some[key].append(one)
            taken += 1
            count += self.count(found)
            left = (ahead - taken) * count / taken  # about
            if count >= most and left >= most / 2:
                break
        vectors = {key: torch.cat(parts) for key, parts in some.items()}
        for number, key in enumerate(self.keys):
            shuffled = order_of(len(vectors[key]), self.settings.seed, epoch, start, number)
            vectors[key] = vectors[key][shuffled]
        return taken, vectors

    @staticmethod
    def count(vectors: Vectors) -> int:
        """Vectors that each autoencoder has at least."""
        return min(len(one) for one in vectors.values())

    def _of_unit(self, part: Part, *, held_out: bool = False) -> Vectors:
        some: dict[RecordingKey, list[Tensor]] = {key: [] for key in self.keys}
        sizes: dict[RecordingKey, int] = {}
        for image_id, recorded in self.runs.vectors(part, self.keys):
            for key, one in recorded.items():
                sizes[key] = one.shape[1]
                if is_held_out(image_id, self.settings.held_out) == held_out:
                    some[key].append(one)
        return {key: torch.cat(parts) if parts else torch.zeros((0, sizes[key])) for key, parts in some.items()}

    def held_out(self, most: int) -> Vectors:
        """Vectors of images that are not learnt from, `most` of each autoencoder at most.

        Raises:
            SinkError: there is no such image.
        """
        some: dict[RecordingKey, list[Tensor]] = {key: [] for key in self.keys}
        for part in self.runs.parts:
            for key, one in self._of_unit(part, held_out=True).items():
                some[key].append(one)
            if min(sum(map(len, parts)) for parts in some.values()) >= most:
                break
        vectors = {key: torch.cat(parts)[:most] for key, parts in some.items()}
        if not self.count(vectors):
            raise SinkError(
                f"training.held_out {self.settings.held_out:g} holds out no image of these. Raise it, or collect more"
            )
        return vectors
