"""The face encoder that ArcFace was published with: a residual network of 50 layers with squeeze and excitation.

Deng et al., arXiv 1801.07698, section 3.1 (improved residual units); Hu et al., arXiv 1709.01507. Parameters have the
names of the widely used checkpoint `model_ir_se50`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import normalize

STAGES = ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))  # channels in, channels out, units
EMBEDDING = 512
SIDE = 112  # pixels; four halvings leave 7


class SqueezeExcite(nn.Module):
    """Weighs channels by what all places together say."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        pooled = hidden.mean(dim=(2, 3), keepdim=True)
        weights: Tensor = self.fc2(self.fc1(pooled).relu()).sigmoid()
        return hidden * weights


class Unit(nn.Module):
    """One residual unit; the first of a stage halves the side."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = (
            nn.MaxPool2d(1, stride)
            if before == after
            else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, after, 3, 1, 1, bias=False),
            nn.PReLU(after),
            nn.Conv2d(after, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            SqueezeExcite(after),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        added: Tensor = self.res_layer(hidden) + self.shortcut_layer(hidden)
        return added


class IRSE50(nn.Module):
    """Faces (B, 3, 112, 112) in [-1, 1] to embeddings (B, 512) of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.body = nn.Sequential(
            *(
                Unit(before if number == 0 else after, after, 2 if number == 0 else 1)
                for before, after, count in STAGES
                for number in range(count)
            )
        )
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * (SIDE // 16) ** 2, EMBEDDING),
            nn.BatchNorm1d(EMBEDDING),
        )

    def forward(self, faces: Tensor) -> Tensor:
        """See the class."""
        embedded: Tensor = self.output_layer(self.body(self.input_layer(faces)))
        return normalize(embedded, dim=1)
