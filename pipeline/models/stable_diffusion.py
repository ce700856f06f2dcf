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
from pipeline.engine.controls import WATCHED_FACTOR
from pipeline.engine.stacking import Shape, Stacked, stack
from pipeline.errors import EditError
from pipeline.models.networks import words_of_tokens
from pipeline.models.unet import OpenedUNet, cross_attention_factors


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
        unet.requires_grad_(False)
        self._network = OpenedUNet(unet, compile_unet=compile_unet)
        self.openings = self._network.openings

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
        watchable = WATCHED_FACTOR in self._watched_factors
        if not watchable or height % WATCHED_FACTOR or width % WATCHED_FACTOR:
            grids = ", ".join(f"{-(-height // f)}x{-(-width // f)}" for f in self._watched_factors) or "none"
            raise EditError(
                f"attention masks are read at a quarter of the latents' side, {height / 4:g}x{width / 4:g} here, and "
                f"this model has cross-attention at {grids}. Set editing.mask: noise, use sides that are multiples of "
                f"{self.multiple} pixels, or another checkpoint"
            )

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        with torch.set_grad_enabled(call.cotangents is not None):
            return self._denoise(call)

    def _denoise(self, call: NetworkCall) -> NetworkAnswer:
        dtype = self._dtype
        times = torch.tensor(call.timesteps, device=self.device)
        inputs = self._with_inpainting(call.latents.to(self.device, dtype), call.inpaint)
        embeddings = torch.stack([embedding.to(self.device) for embedding in call.embeddings])
        if call.cotangents is not None:
            embeddings = embeddings.detach().requires_grad_()
        controls = self._controls(call, embeddings.shape[1])
        output, watched, recorded = self._network.predict(inputs, times, embeddings.to(dtype), controls)
        noise_preds = self._noise_preds(output, call.latents, times)
        grads = None
        if call.cotangents is not None:
            rows = zip(call.cotangents, noise_preds.detach().cpu(), strict=True)
            cotangents = [cotangent(row) for cotangent, row in rows]
            (grads,) = torch.autograd.grad(noise_preds, embeddings, torch.stack(cotangents).to(noise_preds))
        return NetworkAnswer(
            noise_preds=noise_preds.detach(),
            # A compiled graph watches zeros where nobody watches: in two graphs a row's last bits could differ.
            attention=None if call.watch is None or watched is None else watched.detach(),
            recorded={where: written.detach() for where, written in recorded.items()},
            embedding_grads=grads,
        )

    def _controls(self, call: NetworkCall, length: int) -> Stacked | None:
        """What acts in a call, on the device; None: nothing does."""
        height, width = call.latents.shape[-2:]
        shape = Shape(
            plan=call.plan, group=call.group, rows=len(call.timesteps), length=length, height=height, width=width
        )
        whole = self._network.compiles
        stacked = stack(call.controls, call.watch, shape, self.openings, dtype=self._outside, whole=whole)
        return None if stacked is None else stacked.to(self.device)

    def _noise_preds(self, output: Tensor, latents: Tensor, times: Tensor) -> Tensor:
        output = output.to(self._outside)
        return self.schedule.to_noise_pred(output, latents.to(output), times)

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
