"""A diffusion model whose answers are known: images from a Gaussian around one mean per prompt.

For x_0 ~ N(mean, s^2 I) the best noise prediction has a closed form,

    E[eps | x_t] = sqrt(1 - a) (x_t - sqrt(a) mean) / (a s^2 + 1 - a),        a = alpha_bar(t),

so that edits can be checked by algebra, on a CPU, in milliseconds. A prompt's mean is a soft spot of one colour at a
place, both derived from the prompt's text; the empty prompt's mean is zero. Its "VAE" rearranges pixels, without loss.
Being linear it is blind to some mistakes (a wrong seed!): a random UNet must testify as well.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pixel_shuffle, pixel_unshuffle
from typing_extensions import override

from pipeline.diffusion.levels import prediction_of
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.engine.backbone import Backbone, Bottleneck, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction, Product, Span
from pipeline.engine.controls import WATCHED_FACTOR, DecoderBlock, Layer, Openings, ResidualBlock
from pipeline.engine.placing import rows_recorded
from pipeline.errors import EditError
from pipeline.models.gradients import gradients, pulled_back

STABLE_DIFFUSION_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


class AnalyticBackbone(Backbone):
    """The best prediction of the noise on Gaussian images, in closed form: see the module."""

    latent_scale = 4
    latent_channels = 3 * latent_scale**2
    multiple = latent_scale * WATCHED_FACTOR
    text_length = 77
    # Every place that a method may name; what a control does there changes no prediction.
    offers = Offers(
        openings=Openings(
            layers=(
                Layer("self", 0, "down", 0, WATCHED_FACTOR),
                *(Layer("self", number, "up", number - 1, 2 ** (3 - number)) for number in (1, 2, 3)),
            ),
            watched=frozenset({0}),
            residuals=tuple(ResidualBlock(0, number, WATCHED_FACTOR) for number in range(3)),
            decoder=(DecoderBlock(1, latent_channels), DecoderBlock(2, latent_channels)),
        ),
        embedding_gradients=True,
        bottleneck=Bottleneck(
            layer="sums", channels=latent_channels, factor=2, latent_channels=latent_channels, latent_scale=4, side=16
        ),
    )

    def __init__(self, image_size: int = 64, spread: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        self.image_size = image_size
        self.spread = spread  # s, standard deviation of the images around their mean
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.schedule = NoiseSchedule.from_config(STABLE_DIFFUSION_SCHEDULE)
        self.record = ModelRecord(
            name="analytic",
            revision="",
            digest=hashlib.sha256(f"analytic 1 {spread}".encode()).hexdigest()[:16],
            dtype=str(dtype).removeprefix("torch."),
            device="cpu",
        )

    @override
    def encode_text(self, prompt: str) -> Conditioning:
        """Place 0 holds where the prompt's spot is, how strong, and its colour: (L, 6)."""
        words = prompt.split()[: self.text_length - 2]
        embedding = torch.zeros((self.text_length, 6), dtype=self.dtype)
        if words:
            octets = hashlib.sha256(" ".join(words).encode()).digest()
            unit = torch.tensor([octet / 255.0 for octet in octets[:5]], dtype=self.dtype)
            embedding[0] = torch.cat([0.25 + 0.5 * unit[:2], torch.ones(1, dtype=self.dtype), 2.0 * unit[2:] - 1.0])
        own = tuple(2 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") for word in words)
        span = Span(0, (0, *own, 1), range(1, 1 + len(words)), tuple(range(len(words))))
        return Conditioning(prompt, {"embedding": embedding}, (span,))

    @override
    def encode_images(self, pixels: Tensor) -> Tensor:
        image = pixels.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1.0
        return pixel_unshuffle(image, self.latent_scale)

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        image = pixel_shuffle(latents, self.latent_scale).permute(0, 2, 3, 1)
        return ((image + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    @override
    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        return pulled_back(latents, lambda leaf: pixel_shuffle(leaf, self.latent_scale), function)

    def spots(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Where each of R prompts (R, L, 6) has its spot: (R, height, width) in [0, 1]."""
        rows = (torch.arange(height, dtype=self.dtype) + 0.5) / height
        columns = (torch.arange(width, dtype=self.dtype) + 0.5) / width
        place = embeddings[:, 0]
        squared = (rows[None, :, None] - place[:, 0, None, None]) ** 2
        squared = squared + (columns[None, None, :] - place[:, 1, None, None]) ** 2
        return torch.exp(squared / (-2.0 * 0.15**2)) * place[:, 2, None, None]

    def means(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Mean latents (R, C, height, width) of R prompts (R, L, 6)."""
        colours = embeddings[:, 0, 3:6].repeat_interleave(self.latent_scale**2, dim=1)  # (R, C)
        return colours[:, :, None, None] * self.spots(embeddings, height, width)[:, None]

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """Each token's attention is the prompt's spot. Controls may watch it, and change no prediction: this model's
        answers stay known. What a decoder block puts out are the predicted clean latents, at its size.
        """
        if call.beside:
            raise EditError("the analytic model does not inpaint. Use editing.backend: masked")
        with torch.set_grad_enabled(call.cotangents is not None):
            context = torch.stack([one.embedding for one in call.conditioning])
            if call.cotangents is not None:
                context = context.detach().requires_grad_()
            height, width = call.latents.shape[-2:]
            told = [self.schedule.level(int(level.timestep)) for level in call.levels]
            signal, noise = (
                torch.tensor([level[which] for level in told], dtype=self.dtype)[:, None, None, None]
                for which in (0, 1)
            )
            mean = self.means(context, height, width)
            output = noise * (call.latents - signal * mean) / (signal**2 * self.spread**2 + noise**2)
            predictions = prediction_of("epsilon", output, call.latents, call.levels)
            grads = None if call.cotangents is None else gradients(predictions, context, call.cotangents)
        context = context.detach()
        grid = self.spots(context, height // WATCHED_FACTOR, width // WATCHED_FACTOR)
        attention = None
        if call.watch is not None:
            attention = grid[:, None] * call.watch.sum(dim=2)[:, :, None, None].to(self.dtype)
        recorded = {
            where: avg_pool2d(predictions.data[rows].detach(), where[1]) for where, rows in rows_recorded(call).items()
        }
        return NetworkAnswer(predictions.both(torch.Tensor.detach), attention, recorded, grads)

    def weights(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """What each latent counts in the bottleneck, (R, C, height, width): more where the prompt has its spot, and
        less in every further channel.
        """
        by_channel = torch.logspace(0, -16, self.latent_channels, base=2.0, dtype=self.dtype)
        return by_channel[:, None, None] * (1.0 + self.spots(embeddings, height, width)[:, None])

    @override
    def product(self, call: Product) -> Tensor:
        """The bottleneck is linear: weighted sums over 2 x 2 places. No two of its numbers read the same latent, so
        that the Jacobian's rows are orthogonal, and its singular vectors known.
        """
        height, width = call.latents.shape[-2:]
        weights = self.weights(torch.stack([one.embedding for one in call.conditioning]), height, width)
        if call.mode == "push":
            return avg_pool2d(weights * call.vectors, 2, ceil_mode=True, divisor_override=1)
        spread = call.vectors.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return weights * spread[..., :height, :width]
