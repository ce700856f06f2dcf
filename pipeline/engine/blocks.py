"""The transformer blocks of a network under the names that diffusers gives their modules."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from pipeline.engine.controls import Openings, Transformer


@lru_cache(maxsize=64)
def blocks_of(openings: Openings) -> dict[str, Transformer]:
    """Every transformer block, in order of execution: "up_blocks.1.attentions.0".

    Names follow from where a block is: the sides of maps halve from one down block to the next, and double upwards.
    """
    levels = 1 + max((residual.index for residual in openings.residuals), default=0)
    within: Counter[tuple[str, int]] = Counter()
    found = {}
    for block in openings.transformers:
        level = block.factor.bit_length() - 1
        part = {"down": f"down_blocks.{level}", "mid": "mid_block", "up": f"up_blocks.{levels - 1 - level}"}[
            block.place
        ]
        found[f"{part}.attentions.{within[block.place, level]}"] = block
        within[block.place, level] += 1
    return found
