"""Rewards of learned networks: a face's identity, likeness to the source, a picture's style.

The networks are loaded from the folders that `editing.weights` names (`models/reward_networks.py`). Losses and crops
are those of h-Edit's recipes (arXiv 2503.02187, section 5).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity, interpolate
from typing_extensions import override

from pipeline.errors import PrepareError
from pipeline.rewards.base import Reward, RewardSample, reference_of

FACE_CROP = ((35 / 256, 223 / 256), (32 / 256, 220 / 256))  # rows and columns of an aligned face, as shares
FACE_SIDE = 112  # pixels that ArcFace sees
CLIP_SIDE = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def network_of(sample: RewardSample, like: Tensor) -> Any:
    """The reward's network, on the device of a tensor.

    Raises:
        PrepareError: none was brought.
    """
    if sample.network is None:
        raise PrepareError("a learned reward has no network. Name a folder with its weights in editing.weights")
    return sample.network(like.device)


class FaceIdentity(Reward):
    """One minus the cosine of two faces' ArcFace embeddings."""

    learned: ClassVar = "arcface"
    names_reference: ClassVar = True
    reads_image: ClassVar = False

    method: Literal["arcface"] = "arcface"
    """Whose face it is: one minus the cosine of ArcFace embeddings (Deng et al., arXiv 1801.07698), by editing.weights
    arcface. For aligned faces."""
    reference: str = Field(min_length=1)
    """Which of editing.references shows the face."""
    weight: float = Field(default=50.0, ge=0, allow_inf_nan=False)
    """The paper's: 50 with 3 inner steps, 100 with 1."""
    step: Literal["loss", "direction", "gradient"] = "gradient"
    """See the other rewards; the paper's is gradient."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        network = network_of(sample, pixels)
        with torch.no_grad():
            wanted = network(face(reference_of(sample).to(pixels)))
        return 1.0 - cosine_similarity(network(face(pixels)), wanted)[0]


def face(pixels: Tensor) -> Tensor:
    """(1, 3, 112, 112): the middle of an aligned face (3, H, W)."""
    height, width = pixels.shape[-2:]
    (top, bottom), (left, right) = FACE_CROP
    cut = pixels[:, round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
    return adaptive_avg_pool2d(cut, FACE_SIDE)[None]


class Likeness(Reward):
    """LPIPS distance to the source."""

    learned: ClassVar = "lpips"

    method: Literal["lpips"] = "lpips"
    """Distance to the source as people see it: LPIPS with VGG-16 (Zhang et al., arXiv 1801.03924), by editing.weights
    lpips."""
    weight: float = Field(default=50.0, ge=0, allow_inf_nan=False)
    """The paper's: that of the face's identity."""
    step: Literal["loss", "direction", "gradient"] = "gradient"
    """See the other rewards; the paper's is gradient."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        distance: Tensor = network_of(sample, pixels)(pixels[None], sample.image.to(pixels)[None])
        return distance.sum()


class ClipGram(Reward):
    """Distance of the Gram matrices of CLIP's features to those of a picture."""

    learned: ClassVar = "clip"
    names_reference: ClassVar = True
    reads_image: ClassVar = False

    method: Literal["clip_gram"] = "clip_gram"
    """Distance to a picture's style: Frobenius norm of the difference of Gram matrices of a CLIP vision encoder's
    features, by editing.weights clip. The paper's is ViT-B/16."""
    reference: str = Field(min_length=1)
    """Which of editing.references has the style."""
    layer: int = Field(default=2, ge=0)
    """Behind which of the encoder's blocks the features are taken, from 0."""
    weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """The paper's; 0.4 to 0.8 work."""
    step: Literal["loss", "direction", "gradient"] = "direction"
    """See the other rewards; the paper's is direction."""

    @override
    def loss(self, pixels: Tensor, sample: RewardSample) -> Tensor:
        network = network_of(sample, pixels)
        with torch.no_grad():
            wanted = self._gram(network, reference_of(sample).to(pixels))
        return torch.linalg.matrix_norm(self._gram(network, pixels) - wanted)

    def _gram(self, network: Any, pixels: Tensor) -> Tensor:
        states = network(clip_input(pixels), output_hidden_states=True).hidden_states
        if self.layer + 1 >= len(states):  # the first are those before any block
            raise PrepareError(
                f"clip_gram reads layer {self.layer}, and the encoder's {len(states) - 1} count from 0. Lower the "
                "reward's layer"
            )
        features: Tensor = states[self.layer + 1][0, 1:]  # (N, D) without the class token
        return features.mT @ features


def clip_input(pixels: Tensor) -> Tensor:
    """(1, 3, 224, 224), normalised as CLIP's image processor does; differentiable."""
    scaled = interpolate(pixels[None], size=(CLIP_SIDE, CLIP_SIDE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(one).to(pixels)[:, None, None] for one in (CLIP_MEAN, CLIP_STD))
    return ((scaled + 1.0) / 2.0 - mean) / std
