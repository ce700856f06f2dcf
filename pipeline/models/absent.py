"""No model: what stands in its place where a recipe's methods read none. Nothing is loaded, and nothing is computed."""

from __future__ import annotations

import hashlib
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction
from pipeline.errors import EditError
from pipeline.models.analytic import STABLE_DIFFUSION_SCHEDULE


class NoModel(Backbone):
    """Images are nothing to it: their latents are zeros, one per eight pixels along a side, the grain of masks.

    Args:
        image_size: side of the canvas in pixels.
    """

    latent_scale = 8
    latent_channels = 1
    multiple = 8
    offers = Offers(is_absent=True)

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.device = torch.device("cpu")
        self.schedule = NoiseSchedule.from_config(STABLE_DIFFUSION_SCHEDULE)
        digest = hashlib.sha256(b"no model").hexdigest()[:16]
        self.record = ModelRecord(name="none", revision="", digest=digest, dtype="float32", device="cpu")

    @override
    def encode_images(self, pixels: Tensor) -> Tensor:
        count, height, width, _ = pixels.shape
        return torch.zeros((count, self.latent_channels, height // self.latent_scale, width // self.latent_scale))

    @override
    def encode_text(self, prompt: str) -> Conditioning:
        _refuse()

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        _refuse()

    @override
    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        _refuse()

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        _refuse()


def _refuse() -> NoReturn:
    raise EditError("model.name none stands for no model, and this method reads one. Name a model")
