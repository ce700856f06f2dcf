"""Where things are in an image of a drawn face: what `shardedit sae label` asks of tagger, detector and segmenter.

The oracle reads the scene back from the image, and the scene says which pixels each of its attributes has.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from demo_world.oracle import find
from pipeline.models.demo.world import Attribute, Scene, region

ABSENT = (False, None)  # values of objects that are not there


def tag_of(attribute: Attribute, value: str | bool) -> str:
    """The name of an attribute's value: "background: mint", "sunglasses"; a hat is one of any colour."""
    return attribute if value is True or attribute == "hat" else f"{attribute}: {value}"


def drawn_regions(image: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
    """(H, W) bool by tag, of everything that a drawn face shows; the prompt is not asked."""
    return regions_of(find(image).scene, image.shape[0])


@lru_cache(maxsize=256)
def regions_of(scene: Scene, side: int) -> dict[str, np.ndarray]:
    """The same of a scene. The shape of a face shows where its colour shows."""
    return {
        tag_of(name, value): region(scene, name, side)
        for name, value in scene.attributes().items()
        if value not in ABSENT and value is not None
    }
