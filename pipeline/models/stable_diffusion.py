"""A UNet on latents, behind the `Backbone` interface: what Stable Diffusion 1.x, 2.x and XL have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.copying import stacked_on, to_device
from pipeline.diffusion.flow_schedule import FlowSchedule
from pipeline.diffusion.levels import OutputKind, prediction_of
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction, Product
from pipeline.engine.controls import PLAIN, WATCHED_FACTOR
from pipeline.engine.stacking import Shape, Stacked, stack
from pipeline.engine.tuning import Tuning, Ways
from pipeline.errors import EditError
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.compiling import check_compiler
from pipeline.models.gradients import gradients
from pipeline.models.unet import OpenedUNet

WAYS: Ways = {
    "attention": ("flash", "cudnn", "efficient"),
    "layout": ("channels_last",),
    "projections": ("joined",),
    "execution": ("compiled", "graphs"),
}


class Text(Protocol):
    """How a family tells its UNet of a prompt."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts in one call; text beyond the encoder's length is cut."""

    def added(self, conditioning: Sequence[Conditioning], height: int, width: int) -> dict[str, Tensor]:
        """What the UNet takes beside time and text, for R rows of latents (height, width), by its own names."""


class StableDiffusion(Backbone):
    """UNet, autoencoder and text, loaded and opened. See `Backbone` for what each method promises."""

    def __init__(
        self,
        *,
        unet: Any,  # diffusers types its configuration as Any
        autoencoder: Autoencoder,
        text: Text,
        schedule: NoiseSchedule | FlowSchedule,
        offers: Offers,
        record: ModelRecord,
        device: torch.device,
    ) -> None:
        self.unet, self.autoencoder, self.text = unet, autoencoder, text
        self.schedule, self.record, self.device = schedule, record, device
        self.latent_scale = autoencoder.factor
        self.latent_channels = int(unet.config.out_channels)
        self.image_size = int(unet.config.sample_size) * self.latent_scale
        self.multiple = self.latent_scale * WATCHED_FACTOR
        # Read once: diffusers looks through all parameters for it, a fortieth of a small UNet's call.
        self._dtype: torch.dtype = unet.dtype
        # Between model calls everything is float32, or wider where the networks are.
        self._outside = torch.promote_types(self._dtype, torch.float32)
        unet.requires_grad_(False)
        self._network = OpenedUNet(unet)
        self.offers = dataclasses.replace(offers, openings=self._network.openings)

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

    @property
    def ways(self) -> Ways:  # type: ignore[override]  # decided by its device
        """On a GPU; on CPUs results are the same everywhere."""
        return WAYS if self.device.type == "cuda" else {}

    @override
    def tune(self, tuning: Tuning) -> None:
        if tuning == self.tuning:
            return
        if tuning.execution != "eager":
            check_compiler(self.device)
        self.tuning = tuning
        self._network.tune(tuning)

    @override
    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        return self.autoencoder.decode_gradient(latents, function)

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        with torch.set_grad_enabled(call.cotangents is not None):
            return self._denoise(call)

    def _denoise(self, call: NetworkCall) -> NetworkAnswer:
        dtype = self._dtype
        latents = to_device(call.latents.to(self._outside), self.device)
        inputs = self._with_inpainting(latents.to(dtype), call.beside)
        times, embeddings, added = self._told(call)
        if call.cotangents is not None:
            embeddings = embeddings.detach().requires_grad_()
        controls = self._controls(call, embeddings.shape[1])
        output, watched, recorded = self._network.predict(
            inputs,
            times,
            embeddings.to(dtype),
            controls,
            added or None,
            None if added else self._alike(call),
            call.plan.free_u,
        )
        kind: OutputKind = "velocity" if isinstance(self.schedule, FlowSchedule) else self.schedule.prediction_type
        predictions = prediction_of(kind, output.to(self._outside), latents, call.levels)
        grads = None if call.cotangents is None else gradients(predictions, embeddings, call.cotangents)
        return NetworkAnswer(
            predictions.both(torch.Tensor.detach),
            # A compiled graph watches zeros where nobody watches: in two graphs a row's last bits could differ.
            attention=None if call.watch is None or watched is None else watched.detach(),
            recorded={where: written.detach() for where, written in recorded.items()},
            embedding_grads=grads,
        )

    def _told(self, call: NetworkCall | Product) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the network is told beside latents: times (R,), embeddings (R, L, D) and more, on the device."""
        times = to_device(torch.tensor([level.timestep for level in call.levels]), self.device)
        embeddings = stacked_on(self.device, [one.embedding for one in call.conditioning])
        added = self.text.added(call.conditioning, *call.latents.shape[-2:])
        return times, embeddings, {name: to_device(tensor, self.device) for name, tensor in added.items()}

    @override
    def product(self, call: Product) -> Tensor:
        if self.offers.bottleneck is None or self.offers.inputs:
            return super().product(call)
        latents, vectors = (to_device(one.to(self._dtype), self.device) for one in (call.latents, call.vectors))
        times, embeddings, added = self._told(call)
        multiply = self._network.push if call.mode == "push" else self._network.pull
        return multiply(latents, times, embeddings.to(self._dtype), vectors, added or None).to(self._outside)

    def _alike(self, call: NetworkCall) -> Tensor | None:
        """Rows that are the same until cross-attention reads the text: the first self-attention, of most places of all,
        computes them once. Not where text comes in beside the timestep, or the network is given more than latents.

        On a CPU, where an attention's bits do not depend on the number of rows; on a GPU it would save a fiftieth of
        Stable Diffusion's arithmetic, and every call would wait for the number. Always told to a compiled graph: in two
        graphs a row's last bits could differ.
        """
        if self.device.type != "cpu" or call.plan != PLAIN or call.beside or call.cotangents is not None:
            return None
        alike = range(len(call.levels)) if call.alike is None else call.alike
        return torch.tensor(alike)

    def _controls(self, call: NetworkCall, length: int) -> Stacked | None:
        """What acts in a call, on the device; None: nothing does."""
        height, width = call.latents.shape[-2:]
        shape = Shape(
            plan=call.plan, group=call.group, rows=len(call.levels), length=length, height=height, width=width
        )
        openings, whole = self.offers.openings, self._network.compiles
        stacked = stack(call.controls, call.watch, shape, openings, dtype=self._outside, whole=whole)
        return None if stacked is None else stacked.to(self.device)

    def _with_inpainting(self, latents: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
        """The UNet's input: latents alone, or latents, mask and masked image."""
        if set(beside) != self.offers.inputs:
            raise EditError(
                "this checkpoint is an inpainting model, which takes a mask and a masked image, too. Use a plain one, "
                "or editing.method fast_diffedit with backend: inpaint"
                if "inpaint" in self.offers.inputs
                else "this checkpoint is no inpainting model (its UNet has no inputs for mask and masked image). Use "
                "an inpainting checkpoint, or editing.backend: masked"
            )
        return torch.cat(
            [latents, *(to_device(beside[name].to(latents.dtype), latents.device) for name in sorted(beside))], dim=1
        )
