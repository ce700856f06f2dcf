"""The rewards by name: losses of the estimated clean image that an edit can descend beside or without a text.

A new one is its class and its line here.
"""

from __future__ import annotations

from pipeline.rewards.base import Reward, RewardSample
from pipeline.rewards.closed_form import Downsampling, GaussianBlur, MaskedColor, Masking
from pipeline.rewards.gram import RandomGram
from pipeline.rewards.learned import ClipGram, FaceIdentity, Likeness

REWARDS: dict[str, type[Reward]] = {
    "arcface": FaceIdentity,
    "blur": GaussianBlur,
    "clip_gram": ClipGram,
    "downsampling": Downsampling,
    "lpips": Likeness,
    "masked_color": MaskedColor,
    "masking": Masking,
    "random_gram": RandomGram,
}

__all__ = ["REWARDS", "Reward", "RewardSample"]
