"""Seeds of images and of attempts: they depend on names and numbers alone, never on order or place."""

from __future__ import annotations

import hashlib

from pipeline.settings.best_of import BestOfConfig


def seed_for(run_seed: int, image_id: str, purpose: str) -> int:
    """Seed of one image's noise, 0 .. 2^63 - 1: it depends on the image's id, not on its place in a batch or shard.

    Methods that share an inversion share its noise.
    """
    text = "\x1f".join((str(run_seed), image_id, purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def run_seed_of(run_seed: int, config: BestOfConfig | None, attempt: int) -> int:
    """The seed of an attempt's run: the run's own for the first, and for those that change settings alone."""
    variation = None if config is None else config.variation(attempt)
    return run_seed if variation is None or not variation.new_seed else seed_for(run_seed, "attempt", str(attempt))
