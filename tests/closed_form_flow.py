"""A flow-matching model whose answers are known: 16 channels, float times, no attention that anybody could open.

For images from a Gaussian around one mean per prompt, x = (1 - s) x0 + s n has the best velocity in closed form: the
mean noise less the mean image, given x. Nothing of it is like Stable Diffusion but the contract.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from typing_extensions import override

from pipeline.diffusion.levels import Level, Schedule, Step, prediction_of
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction, Valued
from pipeline.errors import EditError
from pipeline.models.gradients import gradients, pulled_back

SPREAD = 0.5  # standard deviation of the images around their mean


class FlowSchedule(Schedule):
    """Sigmas from 1 to 0, shifted towards the noisy end the more, the larger the latents are, as FLUX has it."""

    def sigmas(self, num_steps: int, size: tuple[int, int]) -> list[float]:
        """N + 1 of them, the last 0."""
        shift = 1.0 + size[0] * size[1] / 1024
        even = [1.0 - step / num_steps for step in range(num_steps + 1)]
        return [shift * sigma / (1.0 + (shift - 1.0) * sigma) for sigma in even]

    @override
    def steps(
        self, num_steps: int, size: tuple[int, int], *, leading: bool = False, to_lowest: bool = False
    ) -> tuple[Step, ...]:
        levels = self.multistep_levels(num_steps, size, to_lowest=to_lowest)
        return tuple(Step(*pair) for pair in pairwise(levels))

    @override
    def multistep_levels(self, num_steps: int, size: tuple[int, int], *, to_lowest: bool) -> tuple[Level, ...]:
        if num_steps < 1:
            raise ValueError(f"{num_steps} steps asked for")
        return tuple(Level(1.0 - sigma, sigma, 1000.0 * sigma) for sigma in self.sigmas(num_steps, size))


class ClosedFormFlow(Backbone):
    """The best velocity of Gaussian images, in closed form: see the module."""

    latent_scale = 2
    latent_channels = 16
    multiple = 4
    image_size = 32
    offers = Offers(embedding_gradients=True)

    def __init__(self, dtype: torch.dtype = torch.float32, name: str = "closed-form flow") -> None:
        self.dtype, self.device, self.schedule = dtype, torch.device("cpu"), FlowSchedule()
        self.record = ModelRecord(
            name=name, revision="", digest="0" * 16, dtype=str(dtype).removeprefix("torch."), device="cpu"
        )

    @override
    def encode_text(self, prompt: str) -> Conditioning:
        """One key, the mean's 16 channels; the empty prompt's are zero."""
        octets = hashlib.sha256(prompt.encode()).digest()[:16]
        mean = torch.tensor([octet / 127.5 - 1.0 for octet in octets], dtype=self.dtype) * bool(prompt)
        return Conditioning(prompt, {"embedding": mean[None], "pooled": mean.mean()[None]})

    @override
    def encode_images(self, pixels: Tensor) -> Tensor:
        image = pixels.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1.0
        grey = torch.zeros_like(image[:, :1])
        return pixel_unshuffle(torch.cat([image, grey], dim=1), self.latent_scale)

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        image = pixel_shuffle(latents, self.latent_scale)[:, :3].permute(0, 2, 3, 1)
        return ((image + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    @override
    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> Valued:
        return pulled_back(latents, lambda leaf: pixel_shuffle(leaf, self.latent_scale)[:3], function)

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        if call.controls or call.watch is not None:
            raise EditError("this model has no attention to look at")
        with torch.set_grad_enabled(call.cotangents is not None):
            context = torch.stack([one.embedding for one in call.conditioning])
            if call.cotangents is not None:
                context = context.detach().requires_grad_()
            mean = context[:, 0, :, None, None]
            told = torch.tensor([level.timestep / 1000.0 for level in call.levels], dtype=self.dtype)[
                :, None, None, None
            ]
            offset = call.latents - (1.0 - told) * mean
            total = ((1.0 - told) * SPREAD) ** 2 + told**2
            velocity = told * offset / total - mean - (1.0 - told) * SPREAD**2 * offset / total
            predictions = prediction_of("velocity", velocity, call.latents, call.levels)
            grads = None if call.cotangents is None else gradients(predictions, context, call.cotangents)
        return NetworkAnswer(predictions.both(torch.Tensor.detach), embedding_grads=grads)
