"""What labelling asks of others: which things an image shows and where, and which words are alike.

A pipeline of a tagger (RAM), a detector (Grounding DINO) and a segmenter (SAM), as the paper has it, is a `Labels` made
by `in_turn`; nothing here needs one of them. Without word vectors of a language, equal words alone are alike.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pipeline.errors import RecipeError

WORD_SIZE = 300  # numbers of a word's vector

Regions = Mapping[str, np.ndarray]
"""(H, W) bool by tag: where each of them is to be seen."""

Labels = Callable[[np.ndarray, str], Regions]
"""An image (H, W, 3) uint8 and its prompt to what is to be seen of it."""

ATTENDED = "attended"
"""Names the labels that need no other model: where words of the prompt were attended to (editing.record.attention)."""
ATTENDED_ABOVE = 0.5  # of a word's strongest place

WordVectors = Callable[[str], np.ndarray]
"""A word to (300,) float."""

Box = tuple[float, float, float, float]


class Tagger(Protocol):
    """Names what an image shows."""

    def __call__(self, image: np.ndarray, prompt: str) -> Sequence[str]:
        """Tags, each once."""


class Detector(Protocol):
    """Finds what tags name."""

    def __call__(self, image: np.ndarray, tag: str) -> Sequence[Box]:
        """Boxes (left, top, right, bottom) in pixels; none where it is not to be seen."""


class Segmenter(Protocol):
    """Finds the pixels of what is in a box."""

    def __call__(self, image: np.ndarray, box: Box) -> np.ndarray:
        """(H, W) bool."""


def in_turn(tagger: Tagger, detector: Detector, segmenter: Segmenter) -> Labels:
    """Tags, their boxes, the pixels in these: a tag's region is the union of its boxes'."""

    def labels(image: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        found = {}
        for tag in tagger(image, prompt):
            masks = [segmenter(image, box) for box in detector(image, tag)]
            if masks:
                found[tag] = np.logical_or.reduce(masks)
        return found

    return labels


def attended_regions(maps: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Where words were attended to half as much as where most: (H, W) bool by word, of maps (h', w')."""
    found = {}
    for word, one in maps.items():
        if one.max() > 0:
            rows, columns = (np.arange(length) * one.shape[axis] // length for axis, length in enumerate(size))
            found[word] = (one > ATTENDED_ABOVE * one.max())[rows[:, None], columns[None]]
    return found


def hashed_words(word: str) -> np.ndarray:
    """A unit vector that equal words have in common, and others as good as not: (300,)."""
    digest = hashlib.sha256(word.strip().casefold().encode("utf-8", "surrogatepass")).digest()
    numbers = np.random.default_rng(int.from_bytes(digest[:8], "big")).normal(size=WORD_SIZE)
    return np.asarray(numbers / np.linalg.norm(numbers))


def named(where: str, key: str) -> Any:
    """What "package.module:name" names.

    Raises:
        RecipeError: there is no such thing.
    """
    module, colon, name = where.partition(":")
    try:
        if not colon:
            raise ImportError("it is not written package.module:name")
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError("configuration", [(key, f"'{where}' cannot be used: {error}. Name a function")]) from None
    if not callable(found):
        raise RecipeError("configuration", [(key, f"'{where}' cannot be called. Name a function")])
    return found


def word_vectors(where: str) -> WordVectors:
    """The word vectors that a configuration names."""
    return hashed_words if where == "hash" else named(where, "word_vectors")
