"""A transformer over image and text tokens that predicts flow's velocity, behind the `Backbone` interface: what Stable
Diffusion 3, FLUX and Qwen-Image have in common.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.copying import stacked_on, to_device
from pipeline.diffusion.flow_schedule import PATCH, FlowSchedule
from pipeline.diffusion.levels import prediction_of
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction
from pipeline.engine.controls import Route, resolved
from pipeline.errors import EditError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.joint_attention import JointLayer, OpenedJoint, Watched
from pipeline.models.kernels import exact_float32


class FlowText(ABC):
    """How a family tells its network of a prompt."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts in one call; text beyond an encoder's length is cut."""

    def encode_of(self, prompt: str, picture: np.ndarray) -> Conditioning:
        """Embed a prompt that speaks of a picture (H, W, 3) uint8, which is read with it. Only of families that offer
        it."""
        raise NotImplementedError("a family that offers to read pictures says how")


class Velocity(Protocol):
    """How a family asks its network."""

    transformer: Any  # diffusers types its configuration as Any
    max_side: int | None  # latents; None: any

    def joint_layers(self) -> dict[int, JointLayer]:
        """The joint attention layers, by number in order of execution."""

    def __call__(
        self, latents: Tensor, times: Tensor, told: Mapping[str, Tensor], reference: Tensor | None = None
    ) -> Tensor:
        """Velocity (R, C, h, w) of latents (R, C, h, w), everything on the network's device and in its dtype.

        Args:
            latents: where it is asked.
            times: (R,) float32 or wider, 0 to 1000.
            told: the parts of the rows' conditioning, (R, ...) by name.
            reference: latents (R, C, h', w') of images to read; None: none. Only of families that offer it.
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
        self._joint = OpenedJoint(velocity.joint_layers())
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
    def encode_text_of(self, prompt: str, picture: np.ndarray) -> Conditioning:
        if not self.offers.reads_pictures:
            return super().encode_text_of(prompt, picture)
        return self.text.encode_of(prompt, picture)

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
        watch = self._watch(call)
        with exact_float32(inputs), self._joint.acting(self._swaps(call), watch):
            output = self.velocity(inputs, times, told, self._reference(call))
        # Both halves from float32: near pure noise the prediction of the noise alone has lost the velocity's digits.
        predictions = prediction_of("velocity", output.to(self._outside), latents, call.levels)
        if watch is None:
            return NetworkAnswer(predictions)
        grid = [side // PATCH for side in call.latents.shape[-2:]]
        return NetworkAnswer(predictions, attention=self._joint.watched.unflatten(-1, grid))

    def _watch(self, call: NetworkCall) -> Watched | None:
        if call.watch is None:
            return None
        places = call.latents.shape[-2] // PATCH * (call.latents.shape[-1] // PATCH)
        return Watched(self.offers.openings.watched, to_device(call.watch.to(self._outside), self.device), places)

    def _told(self, conditioning: Sequence[Conditioning]) -> dict[str, Tensor]:
        """What the network is told beside latents and time, (R, ...) by name."""
        return {
            name: stacked_on(self.device, [one.parts[name] for one in conditioning]) for name in conditioning[0].parts
        }

    def _reference(self, call: NetworkCall) -> Tensor | None:
        reference = call.beside.get("reference")
        return None if reference is None else to_device(reference.to(self._dtype), self.device)

    def _swaps(self, call: NetworkCall) -> dict[int, Tensor]:
        """Of layers whose values are swapped the row that each row takes them from, (R,) on the device."""
        rows: dict[int, list[int]] = {}
        for first, control in call.controls:
            for part in control.parts:
                assert isinstance(part, Route)
                if part.value is None:
                    continue
                for layer in resolved(part.layers, self.offers.openings):
                    rows.setdefault(layer, [*range(len(call.levels))])[first + part.row] = first + part.value
        tables: dict[tuple[int, ...], Tensor] = {}  # most layers have the same
        for table in rows.values():
            tables.setdefault(tuple(table), to_device(torch.tensor(table), self.device))
        return {layer: tables[tuple(table)] for layer, table in rows.items()}

    def _refuse(self, call: NetworkCall) -> None:
        """Refuse what the model cannot do."""
        if unknown := call.beside.keys() - ({"reference"} if self.offers.references else set()):
            raise EditError(
                f"this checkpoint takes no {' and no '.join(sorted(unknown))} beside the latents. Use a checkpoint "
                "that does, such as an inpainting one, or another editing.method"
            )
        parts = [part for _, control in call.controls for part in control.parts]
        swaps = all(isinstance(part, Route) and part.query is None and part.key is None for part in parts)
        if not swaps:
            raise EditError(
                "this model has joint attention over image and text, which lets nothing in but other rows' values. Use "
                "another editing.method, or a checkpoint of Stable Diffusion 1.x, 2.x or XL"
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
