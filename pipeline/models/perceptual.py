"""LPIPS (Zhang et al., arXiv 1801.03924): how different two pictures look, by the features of VGG-16.

Parameters have the names that torchvision gives VGG-16's (`features.N`), and the published linear weights (`linN`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # convolutions, block by block
SHIFT, SCALE = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # of pixels in [-1, 1], as the linear weights were fitted
TINY = 1e-10


class Lin(nn.Module):
    """Weights of one block's channels, at least 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, squared: Tensor) -> Tensor:
        """(B, C, h, w) to (B,): the weighted sum of channels, mean over places."""
        weighted: Tensor = self.model(squared)
        return weighted.mean(dim=(1, 2, 3))


class PerceptualDistance(nn.Module):
    """Distances (B,) of pictures (B, 3, H, W) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # behind which layers a block's features stand
        before = 3
        for number, block in enumerate(CHANNELS):
            layers += [nn.MaxPool2d(2)] if number else []
            for after in block:
                layers += [nn.Conv2d(before, after, 3, 1, 1), nn.ReLU()]
                before = after
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for number, block in enumerate(CHANNELS):
            setattr(self, f"lin{number}", Lin(block[-1]))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """See the class."""
        total = one.new_zeros(one.shape[0])
        for number, (ours, theirs) in enumerate(zip(self._seen(one), self._seen(other), strict=True)):
            total = total + getattr(self, f"lin{number}")((ours - theirs).square())
        return total

    def _seen(self, pixels: Tensor) -> list[Tensor]:
        """Every block's features (B, C, h, w), of unit length at each place."""
        shift, scale = (torch.tensor(one).to(pixels)[:, None, None] for one in (SHIFT, SCALE))
        hidden, found = (pixels - shift) / scale, []
        for number, layer in enumerate(self.features):
            hidden = layer(hidden)
            if number in self.ends:
                found.append(hidden / (hidden.square().sum(dim=1, keepdim=True).sqrt() + TINY))
        return found
