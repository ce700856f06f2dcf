"""A Stable Diffusion 1.x or 2.x checkpoint behind the `Backbone` interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Prediction, prediction_of
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import Backbone, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, Span
from pipeline.errors import EditError
from pipeline.models.attention import (
    WATCHED_FACTOR,
    CallControl,
    attention_layers,
    cross_attention_factors,
    decoder_blocks,
    open_attention,
    open_decoder_blocks,
)
from pipeline.models.compiling import compiled
from pipeline.models.gradients import gradients
from pipeline.models.networks import words_of_tokens


class StableDiffusion(Backbone):
    """UNet, VAE, text encoder and tokenizer, loaded and opened. See `Backbone` for what each method promises."""

    def __init__(
        self,
        *,
        # diffusers and transformers type their configurations as Any.
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        schedule: NoiseSchedule,
        record: ModelRecord,
        device: torch.device,
        compile_unet: bool = False,
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule, self.record, self.device = schedule, record, device
        self.latent_scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels = int(unet.config.out_channels)
        inpaints = int(unet.config.in_channels) == 2 * self.latent_channels + 1
        self.image_size = int(unet.config.sample_size) * self.latent_scale
        self.multiple = self.latent_scale * WATCHED_FACTOR
        self.offers = Offers(
            layers=tuple(attention_layers(unet).values()),
            blocks=decoder_blocks(unet),
            watched_factor=WATCHED_FACTOR if WATCHED_FACTOR in cross_attention_factors(unet) else None,
            inputs=frozenset({"inpaint"} if inpaints else ()),
            embedding_gradients=True,
        )
        # Read once: diffusers looks through all parameters for it, a fortieth of a small UNet's call.
        self._dtype: torch.dtype = unet.dtype
        # Between model calls everything is float32, or wider where the networks are.
        self._outside = torch.promote_types(self._dtype, torch.float32)
        open_attention(unet)
        open_decoder_blocks(unet)
        unet.requires_grad_(False)
        self._compiled = compiled(self._predict) if compile_unet else None

    @torch.no_grad()
    @override
    def encode_text(self, prompt: str) -> Conditioning:
        """The length is counted before padding: a fast tokenizer reports the padded one."""
        length = self.tokenizer.model_max_length
        own = self.tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
        token_words = words_of_tokens(prompt, own.offset_mapping[1:-1])
        padded = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        mask = padded.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        embedding = self.text_encoder(padded.input_ids, attention_mask=mask)[0][0]
        span = Span(0, tuple(own.input_ids), range(1, len(own.input_ids) - 1), token_words)
        return Conditioning(prompt, {"embedding": embedding}, (span,))

    @torch.no_grad()
    @override
    def encode_image(self, pixels: np.ndarray) -> Tensor:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device, self.vae.dtype)
        image = image.permute(2, 0, 1)[None] / 127.5 - 1.0
        latents = self.vae.encode(image).latent_dist.mode()[0] * self.vae.config.scaling_factor
        return latents.to("cpu", self._outside)

    @torch.no_grad()
    @override
    def decode_latents(self, latents: Tensor) -> np.ndarray:
        scaled = latents[None].to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        image = self.vae.decode(scaled).sample[0].float()
        return ((image.permute(1, 2, 0) + 1.0) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8).numpy()

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        with torch.set_grad_enabled(call.cotangents is not None):
            return self._denoise(call)

    def _denoise(self, call: NetworkCall) -> NetworkAnswer:
        dtype = self._dtype
        times = torch.tensor([level.timestep for level in call.levels], device=self.device)
        inputs = self._with_inpainting(call.latents.to(self.device, dtype), call.beside)
        embeddings = torch.stack([one.embedding.to(self.device) for one in call.conditioning])
        watch = None if call.watch is None else call.watch.to(self.device)
        if not call.controls and call.cotangents is None:
            first_alike = self._first_alike(call)
            if self._compiled is not None and watch is None and self.offers.is_watchable(*inputs.shape[-2:]):
                # One graph for calls that watch and calls that do not: in two, a row's last bits could differ.
                watch = torch.zeros(embeddings.shape[:2], device=self.device)
            output, attention = (self._compiled or self._predict)(
                inputs, times, embeddings.to(dtype), watch, first_alike
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
            output = self._unet(inputs, times, embeddings.to(dtype), own)
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
        self, inputs: Tensor, times: Tensor, embeddings: Tensor, watch: Tensor | None, first_alike: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The UNet's output and the watched attention. What is compiled, where that is asked for: tensors alone go in
        and come out, and their shapes are one call's."""
        control = CallControl(watch, (), first_alike)
        output = self._unet(inputs, times, embeddings, control)
        return output, control.mean(*inputs.shape[-2:])

    def _unet(self, inputs: Tensor, times: Tensor, embeddings: Tensor, control: CallControl) -> Tensor:
        output: Tensor = self.unet(
            inputs,
            times,
            encoder_hidden_states=embeddings,
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
