"""A transformer over image and text tokens that predicts flow's velocity, behind the `Backbone` interface: what Stable
Diffusion 3 and FLUX have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.copying import stacked_on, to_device
from pipeline.diffusion.flow_schedule import PATCH, FlowSchedule
from pipeline.diffusion.levels import prediction_of
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction
from pipeline.errors import EditError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.kernels import exact_float32


class FlowText(Protocol):
    """How a family tells its network of a prompt."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts in one call; text beyond an encoder's length is cut."""


class Velocity(Protocol):
    """How a family asks its network."""

    transformer: Any  # diffusers types its configuration as Any
    max_side: int | None  # latents; None: any

    def __call__(self, latents: Tensor, times: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """Velocity (R, C, h, w) of latents (R, C, h, w), everything on the network's device and in its dtype.

        Args:
            latents: where it is asked.
            times: (R,) float32 or wider, 0 to 1000.
            told: the parts of the rows' conditioning, (R, ...) by name.
        """


class FlowTransformer(Backbone):
    """Transformer, autoencoder and text, loaded. See `Backbone` for what each method promises."""

    def __init__(
        self,
        *,
        velocity: Velocity,
        autoencoder: Autoencoder,
        text: FlowText,
        schedule: FlowSchedule,
        offers: Offers,
        record: ModelRecord,
        device: torch.device,
        side: int,
    ) -> None:
        """`side`: of the latents that it was made for."""
        self.velocity, self.autoencoder, self.text = velocity, autoencoder, text
        self.schedule, self.offers, self.record, self.device = schedule, offers, record, device
        self.latent_scale = autoencoder.factor
        self.latent_channels = int(autoencoder.vae.config.latent_channels)
        self.image_size = side * self.latent_scale
        self.multiple = PATCH * self.latent_scale
        self.max_side = None if velocity.max_side is None else velocity.max_side * self.latent_scale
        self._dtype: torch.dtype = velocity.transformer.dtype
        # Between model calls everything is float32, or wider where the networks are.
        self._outside = torch.promote_types(self._dtype, torch.float32)

    @override
    def encode_text(self, prompt: str) -> Conditioning:
        return self.text.encode((prompt,))[0]

    @override
    def encode_texts(self, prompts: Sequence[str]) -> list[Conditioning]:
        return self.text.encode(prompts)

    @override
    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels)

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    @override
    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        return self.autoencoder.decode_gradient(latents, function)

    @override
    @torch.no_grad()
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        self._refuse(call)
        latents = to_device(call.latents.to(self._outside), self.device)
        times = to_device(torch.tensor([level.timestep for level in call.levels], dtype=self._outside), self.device)
        told = self._told(call.conditioning)
        inputs = latents.to(self._dtype)
        with exact_float32(inputs):
            output = self.velocity(inputs, times, told)
        # Both halves from float32: near pure noise the prediction of the noise alone has lost the velocity's digits.
        return NetworkAnswer(prediction_of("velocity", output.to(self._outside), latents, call.levels))

    def _told(self, conditioning: Sequence[Conditioning]) -> dict[str, Tensor]:
        """What the network is told beside latents and time, (R, ...) by name."""
        return {
            name: stacked_on(self.device, [one.parts[name] for one in conditioning]) for name in conditioning[0].parts
        }

    def _refuse(self, call: NetworkCall) -> None:
        """Refuse what the model cannot do."""
        if call.beside:
            raise EditError(
                f"this checkpoint takes no {' and no '.join(sorted(call.beside))} beside the latents. Use a checkpoint "
                "that does, such as an inpainting one, or another editing.method"
            )
        if call.controls or call.watch is not None:
            raise EditError(
                "this model has joint attention over image and text, whose layers let no controls in. Set "
                "editing.mask: noise where the method has one, or use a checkpoint of Stable Diffusion 1.x, 2.x or XL"
            )
        if call.cotangents is not None:
            raise EditError(
                "this model gives no gradients to its text embeddings. Use inversion.method negative_prompt"
            )
        largest = max(call.latents.shape[-2:])
        if self.velocity.max_side is not None and largest > self.velocity.max_side:
            raise EditError(
                f"the image has a side of {largest * self.latent_scale} pixels, and the checkpoint's table of "
                f"positions ends at {self.max_side}. Set model.size to {self.max_side} or less, or model.fit: pad"
            )
