"""A UNet on latents, behind the `Backbone` interface: what Stable Diffusion 1.x, 2.x and XL have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Prediction, prediction_of
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall
from pipeline.errors import EditError
from pipeline.models.attention import (
    WATCHED_FACTOR,
    CallControl,
    open_attention,
    open_decoder_blocks,
)
from pipeline.models.autoencoder import Autoencoder
from pipeline.models.compiling import compiled
from pipeline.models.gradients import gradients


class Text(Protocol):
    """How a family tells its UNet of a prompt."""

    def encode(self, prompt: str) -> Conditioning:
        """Embed one prompt; text beyond the encoder's length is cut."""

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
        schedule: NoiseSchedule,
        offers: Offers,
        record: ModelRecord,
        device: torch.device,
        compile_unet: bool = False,
    ) -> None:
        self.unet, self.autoencoder, self.text = unet, autoencoder, text
        self.schedule, self.offers, self.record, self.device = schedule, offers, record, device
        self.latent_scale = autoencoder.factor
        self.latent_channels = int(unet.config.out_channels)
        self.image_size = int(unet.config.sample_size) * self.latent_scale
        self.multiple = self.latent_scale * WATCHED_FACTOR
        # Read once: diffusers looks through all parameters for it, a fortieth of a small UNet's call.
        self._dtype: torch.dtype = unet.dtype
        # Between model calls everything is float32, or wider where the networks are.
        self._outside = torch.promote_types(self._dtype, torch.float32)
        open_attention(unet)
        open_decoder_blocks(unet)
        unet.requires_grad_(False)
        self._compiled = compiled(self._predict) if compile_unet else None

    @override
    def encode_text(self, prompt: str) -> Conditioning:
        return self.text.encode(prompt)

    @override
    def encode_image(self, pixels: np.ndarray) -> Tensor:
        return self.autoencoder.encode(pixels)

    @override
    def decode_latents(self, latents: Tensor) -> np.ndarray:
        return self.autoencoder.decode(latents)

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        with torch.set_grad_enabled(call.cotangents is not None):
            return self._denoise(call)

    def _denoise(self, call: NetworkCall) -> NetworkAnswer:
        dtype = self._dtype
        times = torch.tensor([level.timestep for level in call.levels], device=self.device)
        inputs = self._with_inpainting(call.latents.to(self.device, dtype), call.beside)
        embeddings = torch.stack([one.embedding.to(self.device) for one in call.conditioning])
        added = self.text.added(call.conditioning, *inputs.shape[-2:])
        added = {name: tensor.to(self.device) for name, tensor in added.items()}
        watch = None if call.watch is None else call.watch.to(self.device)
        if not call.controls and call.cotangents is None:
            # What is added beside the timestep tells rows apart from the first block on.
            first_alike = None if added else self._first_alike(call)
            if self._compiled is not None and watch is None and self.offers.is_watchable(*inputs.shape[-2:]):
                # One graph for calls that watch and calls that do not: in two, a row's last bits could differ.
                watch = torch.zeros(embeddings.shape[:2], device=self.device)
            output, attention = (self._compiled or self._predict)(
                inputs, times, embeddings.to(dtype), added, watch, first_alike
            )
            predictions = self._predictions(output, call)
            return NetworkAnswer(predictions, attention=None if call.watch is None else attention)
        if call.cotangents is not None:
            embeddings = embeddings.detach().requires_grad_()
        height, width = inputs.shape[-2:]
        hooks = [(rows, control.hook(height, width, self.device)) for rows, control in call.controls]
        own = CallControl(watch, hooks)
        self.unet.shardedit_control = own
        try:
            output = self._unet(inputs, times, embeddings.to(dtype), added, own)
        finally:
            self.unet.shardedit_control = None
        predictions = self._predictions(output, call)
        grads = None if call.cotangents is None else gradients(predictions, embeddings, call.cotangents)
        return NetworkAnswer(
            predictions.both(torch.Tensor.detach),
            attention=own.mean(height, width),
            seen=tuple(hook.answer() for _, hook in hooks),
            embedding_grads=grads,
        )

    def _predict(
        self,
        inputs: Tensor,
        times: Tensor,
        embeddings: Tensor,
        added: dict[str, Tensor],
        watch: Tensor | None,
        first_alike: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The UNet's output and the watched attention. What is compiled, where that is asked for: tensors alone go in
        and come out, and their shapes are one call's."""
        control = CallControl(watch, (), first_alike)
        output = self._unet(inputs, times, embeddings, added, control)
        return output, control.mean(*inputs.shape[-2:])

    def _unet(
        self, inputs: Tensor, times: Tensor, embeddings: Tensor, added: dict[str, Tensor], control: CallControl
    ) -> Tensor:
        output: Tensor = self.unet(
            inputs,
            times,
            encoder_hidden_states=embeddings,
            added_cond_kwargs=added or None,
            cross_attention_kwargs={"control": control},
            return_dict=False,
        )[0]
        return output

    def _predictions(self, output: Tensor, call: NetworkCall) -> Prediction:
        output = output.to(self._outside)
        return prediction_of(self.schedule.prediction_type, output, call.latents.to(output), call.levels)

    def _first_alike(self, call: NetworkCall) -> Tensor | None:
        """For each row the first of those that are the same until the text is read; None where it is not used.

        Only on a CPU: there a slice's fused attention has the same bits in batches of any size, as the rows of two
        calls with different numbers of distinct rows must.
        """
        if self.device.type != "cpu" or call.beside:
            return None
        rows = range(len(call.levels))
        alike = list(call.first_alike or rows)
        # A compiled graph is the same one whether rows are alike or not.
        return None if self._compiled is None and alike == list(rows) else torch.tensor(alike)

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
        return torch.cat([latents, *(beside[name].to(latents) for name in sorted(beside))], dim=1)
