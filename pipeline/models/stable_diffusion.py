"""A Stable Diffusion 1.x or 2.x checkpoint behind the `Backbone` interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import Backbone, ModelRecord
from pipeline.engine.calls import NetworkAnswer, NetworkCall, TextConditioning
from pipeline.errors import EditError
from pipeline.models.attention import (
    WATCHED_FACTOR,
    CallControl,
    cross_attention_factors,
    open_attention,
    open_decoder_blocks,
)
from pipeline.models.compiling import compiled
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
        self.inpaints = int(unet.config.in_channels) == 2 * self.latent_channels + 1
        self.image_size = int(unet.config.sample_size) * self.latent_scale
        self.multiple = self.latent_scale * WATCHED_FACTOR
        self._watched_factors = cross_attention_factors(unet)
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
    def encode_text(self, prompt: str) -> TextConditioning:
        """The length is counted before padding: a fast tokenizer reports the padded one."""
        length = self.tokenizer.model_max_length
        own = self.tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
        token_words = words_of_tokens(prompt, own.offset_mapping[1:-1])
        padded = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        mask = padded.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        embedding = self.text_encoder(padded.input_ids, attention_mask=mask)[0][0]
        token_ids = tuple(own.input_ids)
        return TextConditioning(prompt, embedding, len(token_ids) - 2, token_ids, token_words)

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
    def check_watchable(self, height: int, width: int) -> None:
        if not self._is_watchable(height, width):
            grids = ", ".join(f"{-(-height // f)}x{-(-width // f)}" for f in self._watched_factors) or "none"
            raise EditError(
                f"attention masks are read at a quarter of the latents' side, {height / 4:g}x{width / 4:g} here, and "
                f"this model has cross-attention at {grids}. Set editing.mask: noise, use sides that are multiples of "
                f"{self.multiple} pixels, or another checkpoint"
            )

    def _is_watchable(self, height: int, width: int) -> bool:
        return WATCHED_FACTOR in self._watched_factors and not height % WATCHED_FACTOR and not width % WATCHED_FACTOR

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        with torch.set_grad_enabled(call.cotangents is not None):
            return self._denoise(call)

    def _denoise(self, call: NetworkCall) -> NetworkAnswer:
        dtype = self._dtype
        times = torch.tensor(call.timesteps, device=self.device)
        inputs = self._with_inpainting(call.latents.to(self.device, dtype), call.inpaint)
        embeddings = torch.stack([embedding.to(self.device) for embedding in call.embeddings])
        watch = None if call.watch is None else call.watch.to(self.device)
        if not call.controls and call.cotangents is None:
            first_alike = self._first_alike(call)
            if self._compiled is not None and watch is None and self._is_watchable(*inputs.shape[-2:]):
                # One graph for calls that watch and calls that do not: in two, a row's last bits could differ.
                watch = torch.zeros(embeddings.shape[:2], device=self.device)
            output, attention = (self._compiled or self._predict)(
                inputs, times, embeddings.to(dtype), watch, first_alike
            )
            noise_preds = self._noise_preds(output, call.latents, times)
            return NetworkAnswer(noise_preds=noise_preds, attention=None if call.watch is None else attention)
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
        noise_preds = self._noise_preds(output, call.latents, times)
        grads = None
        if call.cotangents is not None:
            rows = zip(call.cotangents, noise_preds.detach().cpu(), strict=True)
            cotangents = [cotangent(row) for cotangent, row in rows]
            (grads,) = torch.autograd.grad(noise_preds, embeddings, torch.stack(cotangents).to(noise_preds))
        return NetworkAnswer(
            noise_preds=noise_preds.detach(),
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

    def _noise_preds(self, output: Tensor, latents: Tensor, times: Tensor) -> Tensor:
        output = output.to(self._outside)
        return self.schedule.to_noise_pred(output, latents.to(output), times)

    def _first_alike(self, call: NetworkCall) -> Tensor | None:
        """For each row the first of those that are the same until the text is read; None where it is not used.

        Only on a CPU: there a slice's fused attention has the same bits in batches of any size, as the rows of two
        calls with different numbers of distinct rows must.
        """
        if self.device.type != "cpu" or call.inpaint is not None:
            return None
        rows = range(len(call.timesteps))
        alike = list(call.first_alike or rows)
        # A compiled graph is the same one whether rows are alike or not.
        return None if self._compiled is None and alike == list(rows) else torch.tensor(alike)

    def _with_inpainting(self, latents: Tensor, inpaint: Tensor | None) -> Tensor:
        """The UNet's input: latents alone, or latents, mask and masked image."""
        if self.inpaints != (inpaint is not None):
            raise EditError(
                "this checkpoint is an inpainting model, which takes a mask and a masked image, too. Use a plain one, "
                "or editing.method fast_diffedit with backend: inpaint"
                if self.inpaints
                else "this checkpoint is no inpainting model (its UNet has no inputs for mask and masked image). Use "
                "an inpainting checkpoint, or editing.backend: masked"
            )
        return latents if inpaint is None else torch.cat([latents, inpaint.to(latents)], dim=1)
