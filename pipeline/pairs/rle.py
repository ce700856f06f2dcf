"""Masks as COCO's compressed run lengths, as `pycocotools.mask.encode` writes and `decode` reads them.

Runs go down the columns and begin with one of zeros, which may be empty. From the fourth on each is stored as its
difference to the one two before, in groups of five bits, the lowest first, as printable characters.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

FIRST_CHARACTER = 48
MORE, SIGN, BITS = 0x20, 0x10, 5


def rle_of(mask: Bool[np.ndarray, "H W"]) -> dict[str, list[int] | str]:
    """A mask as {"size": [H, W], "counts": text}."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    counts = [run - runs[at - 2] if at > 2 else run for at, run in enumerate(runs)]
    return {"size": [int(side) for side in mask.shape], "counts": "".join(map(_characters, counts))}


def _characters(value: int) -> str:
    found = ""
    while True:
        low = value & (MORE - 1)
        value >>= BITS
        ends = value == (-1 if low & SIGN else 0)
        found += chr((low if ends else low | MORE) + FIRST_CHARACTER)
        if ends:
            return found
