"""The drawn world as a benchmark: faces in ten kinds of edits whose outcome, and every changed pixel, is known.

The kinds are numbered as those of PIE-Bench, so that tables of both read alike. No file is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.items import Item
from pipeline.models.demo.world import Scene, changed_region, draw, edited, object_phrases, with_article
from pipeline.records import Concept, EditRequest, WordPair
from pipeline.writing.rows import encode_mask, encode_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of edit."""

    before: Mapping[str, Any]  # attributes that a scene gets, so that there is something to do
    after: Mapping[str, Any]  # attributes that the edit shall change
    source_words: tuple[str, ...]  # of the two descriptions, where the change is
    target_words: tuple[str, ...]
    concepts: tuple[Concept, ...]
    instruction: str


def _add(prompt: str) -> Concept:
    return Concept(prompt=prompt, guidance_scale=7, threshold=0.9)


def _remove(prompt: str) -> Concept:
    return Concept(prompt=prompt, guidance_scale=7, threshold=0.9, direction="remove")


def _everywhere(prompt: str) -> Concept:
    return Concept(prompt=prompt, guidance_scale=5, threshold=0.5)


KINDS: dict[str, Kind] = {
    "0": Kind(
        before={"sunglasses": False, "mouth": "smile"},
        after={"sunglasses": True, "mouth": "open"},
        source_words=("smile",),
        target_words=("sunglasses", "open", "mouth"),
        concepts=(_add("sunglasses"), _add("an open mouth")),
        instruction="Put sunglasses on the face and open its mouth.",
    ),
    "1": Kind(
        before={"sunglasses": False, "hat": "red"},
        after={"sunglasses": True, "hat": None},
        source_words=("hat",),
        target_words=("sunglasses",),
        concepts=(_add("sunglasses"), _remove("a red hat")),
        instruction="Replace the hat by sunglasses.",
    ),
    "2": Kind(
        before={"hat": None},
        after={"hat": "red"},
        source_words=(),
        target_words=("red", "hat"),
        concepts=(_add("a red hat"),),
        instruction="Add a red hat.",
    ),
    "3": Kind(
        before={"sunglasses": True},
        after={"sunglasses": False},
        source_words=("sunglasses",),
        target_words=(),
        concepts=(_remove("sunglasses"),),
        instruction="Take the sunglasses off.",
    ),
    "4": Kind(
        before={"mouth": "smile"},
        after={"mouth": "open"},
        source_words=("smile",),
        target_words=("open", "mouth"),
        concepts=(_add("an open mouth"),),
        instruction="Open the mouth.",
    ),
    "5": Kind(
        before={"mouth": "smile"},
        after={"mouth": "frown"},
        source_words=("smile",),
        target_words=("frown",),
        concepts=(_add("a frown"),),
        instruction="Let the face frown.",
    ),
    "6": Kind(
        before={"face_color": "yellow"},
        after={"face_color": "green"},
        source_words=("yellow", "face"),
        target_words=("green", "face"),
        concepts=(_everywhere("a green face"),),
        instruction="Make the face green.",
    ),
    "7": Kind(
        before={"beard": False},
        after={"beard": True},
        source_words=(),
        target_words=("beard",),
        concepts=(_add("a beard"),),
        instruction="Give the face a beard.",
    ),
    "8": Kind(
        before={"background": "mint"},
        after={"background": "navy"},
        source_words=("mint", "background"),
        target_words=("navy", "background"),
        concepts=(_everywhere("a navy background"),),
        instruction="Make the background navy.",
    ),
    "9": Kind(
        before={"face_shape": "round"},
        after={"face_shape": "square"},
        source_words=("round",),
        target_words=("square",),
        concepts=(_everywhere("a square face"),),
        instruction="Make the face square.",
    ),
}


def description(scene: Scene) -> str:
    """All that is to be seen, always in the same words and order, so that two descriptions differ as the scenes do."""
    extras = object_phrases(scene, bare_hat=False)
    listed = extras[0] if len(extras) == 1 else f"{', '.join(extras[:-1])} and {extras[-1]}"
    face = with_article(f"{scene.face_shape} {scene.face_color} face")
    return f"{face} with {listed} on a {scene.background} background"


def items_of(count: int, seed: int = 0, size: int = 128) -> Iterator[Item]:
    """`count` scenes, the kinds of edits in turn.

    Args:
        count: of items.
        seed: of the scenes; each has a generator of its own, so that more items change none.
        size: side in pixels.
    """
    for number in range(count):
        name = list(KINDS)[number % len(KINDS)]
        kind = KINDS[name]
        before = edited(Scene.random(np.random.default_rng([seed, 20_000, number])), **kind.before)
        after = edited(before, **kind.after)
        yield Item(
            key=f"{name}{number:011d}",
            image=encode_png(draw(before, size)),
            request=EditRequest(
                source_prompt=description(before),
                target_prompt=description(after),
                instruction=kind.instruction,
                concepts=kind.concepts,
                blend_words=WordPair(source=kind.source_words, target=kind.target_words),
            ),
            edit_type=name,
            region=encode_mask(changed_region(before, after, size)),
            truth=encode_png(draw(after, size)),
            facts={"before": asdict(before), "after": asdict(after), "changes": sorted(kind.after)},
        )
