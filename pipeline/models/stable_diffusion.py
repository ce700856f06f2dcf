"""A Stable Diffusion 1.x or 2.x checkpoint behind the `Backbone` interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.calls import TextConditioning
from pipeline.errors import EditError
from pipeline.models.attention import WATCHED_FACTOR, Watch, cross_attention_factors, open_attention
from pipeline.models.backbone import ModelRecord


class StableDiffusion:
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
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule, self.record, self.device = schedule, record, device
        self.latent_scale = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels = int(unet.config.in_channels)
        self.image_size = int(unet.config.sample_size) * self.latent_scale
        self.multiple = self.latent_scale * WATCHED_FACTOR
        self._watched_factors = cross_attention_factors(unet)
        # Between model calls everything is float32, or wider where the networks are.
        self._outside = torch.promote_types(unet.dtype, torch.float32)
        open_attention(unet)

    @torch.no_grad()
    def encode_text(self, prompt: str) -> TextConditioning:
        """See `Backbone`. The length is counted before padding: a fast tokenizer reports the padded one."""
        length = self.tokenizer.model_max_length
        own = self.tokenizer(prompt, truncation=True, max_length=length).input_ids
        padded = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        mask = padded.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        embedding = self.text_encoder(padded.input_ids, attention_mask=mask)[0][0]
        return TextConditioning(prompt, embedding, token_count=len(own) - 2)

    @torch.no_grad()
    def encode_image(self, pixels: np.ndarray) -> Tensor:
        """See `Backbone`."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device, self.vae.dtype)
        image = image.permute(2, 0, 1)[None] / 127.5 - 1.0
        latents = self.vae.encode(image).latent_dist.mode()[0] * self.vae.config.scaling_factor
        return latents.to("cpu", self._outside)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """See `Backbone`."""
        scaled = latents[None].to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        image = self.vae.decode(scaled).sample[0].float()
        return ((image.permute(1, 2, 0) + 1.0) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8).numpy()

    def check_watchable(self, height: int, width: int) -> None:
        """See `Backbone`."""
        if WATCHED_FACTOR not in self._watched_factors or height % WATCHED_FACTOR or width % WATCHED_FACTOR:
            grids = ", ".join(f"{-(-height // f)}x{-(-width // f)}" for f in self._watched_factors) or "none"
            raise EditError(
                f"attention masks are read at a quarter of the latents' side, {height / 4:g}x{width / 4:g} here, and "
                f"this model has cross-attention at {grids}. Set editing.mask: noise, use sides that are multiples of "
                f"{self.multiple} pixels, or another checkpoint"
            )

    @torch.no_grad()
    def denoise(
        self, latents: Tensor, timesteps: Sequence[int], embeddings: Sequence[Tensor], watch: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backbone`."""
        dtype = self.unet.dtype
        times = torch.tensor(timesteps, device=self.device)
        control = None if watch is None else Watch(watch.to(self.device))
        output = self.unet(
            latents.to(self.device, dtype),
            times,
            encoder_hidden_states=torch.stack(list(embeddings)),
            cross_attention_kwargs=None if control is None else {"control": control},
            return_dict=False,
        )[0].to(self._outside)
        noise_preds = self.schedule.to_noise_pred(output, latents.to(output), times)
        if control is None:
            return noise_preds, None
        return noise_preds, control.mean(latents.shape[-2] // WATCHED_FACTOR, latents.shape[-1] // WATCHED_FACTOR)
