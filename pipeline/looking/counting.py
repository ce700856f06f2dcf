"""How many network rows an image will take: the generators that edit it run against a model that answers with zeros."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import prediction_of
from pipeline.diffusion.schedule import NoiseSchedule
from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder
from pipeline.directions import StoredDirection
from pipeline.engine.backbone import Backbone, Bottleneck, ModelRecord, Offers
from pipeline.engine.calls import Conditioning, NetworkAnswer, NetworkCall, PixelFunction, Product, Span
from pipeline.engine.controls import DecoderBlock, Openings, Records, Transformer
from pipeline.engine.engine import Engine
from pipeline.flow import bounds_before
from pipeline.gating.gain import gain_seed_of
from pipeline.interventions import BlockAutoencoder, ConceptFeatures, Intervention, Library, Target, Telling
from pipeline.one_image import Setup, edit_prepared
from pipeline.recipe import Recipe
from pipeline.records import EditRequest, Placement, Prepared
from pipeline.samples import Sample


@dataclass(slots=True)
class RowCounter:
    """Network rows of one image under some requests, by running the flow's own generators. Each distinct case is run
    once."""

    recipe: Recipe
    told_guidance: bool = False  # whether the model takes a guidance scale, so that one row is guided already
    known: dict[Any, int] = field(default_factory=dict)

    def rows(
        self,
        requests: Mapping[str, EditRequest],
        *,
        masked: bool = False,
        refused: frozenset[tuple[str, str]] = frozenset(),
    ) -> int:
        """Network rows of an image that is edited as `requests` say, by every method of the recipe.

        `refused` are the (edit, method) that fail by what the prompts say, which the case does not tell.
        """
        case = (_anonymous(requests), masked, refused)
        if case not in self.known:
            self.known[case] = self._count(requests, masked)
        return self.known[case]

    def _count(self, requests: Mapping[str, EditRequest], masked: bool) -> int:
        backbone = ZeroBackbone(told_guidance=self.told_guidance)
        side = ZeroBackbone.image_size
        blank = np.zeros((side, side, 3), dtype=np.uint8)
        whole = (side, side)
        prepared = Prepared(
            sample=Sample(id="plan", shard="plan", key="plan", index=0, image=b""),
            original=blank,
            pixels=blank,
            placement=Placement(original=whole, crop=(0, 0, side, side), scaled=whole, offset=(0, 0), canvas=whole),
            mask=np.ones(whole, dtype=np.float32) if masked else None,
            allowed=np.ones(whole, dtype=bool) if masked else None,
            requests=requests,
        )
        engine = Engine(backbone, call_size=64, pad=False)
        setup = Setup(
            methods=self.recipe.all_methods,
            run_seed=0,
            stored=_AnyFile(),
            libraries=_AnyLibrary(),
            blocks=_AnyBlock(),
            bases=self.recipe.writes_bases,
            before=bounds_before(self.recipe),
            gain_seed=gain_seed_of(self.recipe),
        )
        (finished,) = engine.run([edit_prepared(prepared, setup, backbone)])
        if finished.error is not None:
            raise finished.error
        return finished.network_rows


def _anonymous(requests: Mapping[str, EditRequest]) -> str:
    """Requests with their texts numbered: which texts are equal may decide what is computed, what they say does not."""
    numbers: dict[str, str] = {"": ""}

    def hide(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: hide(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [hide(item, key) for item in value]
        if key.endswith(("prompt", "prompts")) or key == "instruction":
            return numbers.setdefault(value, f"text {len(numbers)}")
        return value

    return repr([hide(request.model_dump()) for _, request in sorted(requests.items())])


class _AnyFile(dict[str, Mapping[str, StoredDirection]]):
    """Whatever file of directions is named, and whatever direction in it: of the zero model, and kept anywhere."""

    def __missing__(self, file: str) -> Mapping[str, StoredDirection]:
        return _AnyDirection()


class _AnyDirection(dict[str, StoredDirection]):
    def __missing__(self, name: str) -> StoredDirection:
        assert ZeroBackbone.offers.bottleneck is not None
        side = ZeroBackbone.image_size // ZeroBackbone.latent_scale
        shape = ZeroBackbone.offers.bottleneck.shape(side, side)
        far = torch.full((math.prod(shape),), 1e9)  # however little a basis holds of it, it is enough
        return StoredDirection(
            name=name, feature=far, shape=shape, layer="none", timestep=None, model_digest="", model="zeros"
        )


BLOCKS = tuple(Transformer("mid", number, 8, 1) for number in range(64))
EVERYWHERE = Telling(features=(0,), weights=(1.0,), threshold=-1.0, iou=0.0)
FEATURE = ConceptFeatures(telling=EVERYWHERE, amounts=(1.0,), placing=EVERYWHERE)


class _AnyBlock(dict[str, Transformer]):
    """Whatever block is named, each another one: of one channel."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Transformer:
        self[name] = BLOCKS[len(self)]
        return self[name]


class _AnyLibrary(dict[str, Library]):
    """Whatever folder of autoencoders is named, and whatever concept in it: one feature of one block, at every step."""

    def __missing__(self, folder: str) -> Library:
        return _OneFeature()


class _OneFeature:
    """A library of one autoencoder."""

    def __init__(self) -> None:
        one, zero = torch.ones((1, 1)), torch.zeros(1)
        autoencoder = SparseAutoencoder(one, one.clone(), zero, zero.clone(), 1)
        self._entry = BlockAutoencoder(
            autoencoder=autoencoder,
            block="mid_block.attentions.0",
            branch="cond",
            timestep=None,
            model="zeros",
            model_digest="",
        )

    def targets(self, wanted: Intervention, timestep: float, reach: float) -> list[Target]:
        """The one feature, for all that is named."""
        add = (FEATURE,) if wanted.add or wanted.features else ()
        return [Target(self._entry, add, (FEATURE,) if wanted.remove else ())]

    def located(self, name: str, timestep: float, reach: float) -> tuple[BlockAutoencoder, ConceptFeatures]:
        """The one feature."""
        return self._entry, FEATURE


class ZeroBackbone(Backbone):
    """A model that answers nearly everything with zeros, at once. Only how often it is asked has a meaning."""

    record = ModelRecord(name="zeros", revision="", digest="", dtype="float32", device="cpu")
    schedule = NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    device = torch.device("cpu")
    latent_channels = 4
    latent_scale = 8
    multiple = 64
    offers = Offers(
        openings=Openings(
            watched=frozenset({0}), transformers=BLOCKS, decoder=(DecoderBlock(1, 4), DecoderBlock(2, 4))
        ),
        embedding_gradients=True,
        bottleneck=Bottleneck(layer="none", channels=128, factor=8, latent_channels=4, latent_scale=8, side=16),
    )
    image_size = 128  # latents of 16 x 16

    def __init__(self, *, told_guidance: bool = False) -> None:
        self._told: dict[str, Tensor] = {"guidance": torch.ones(())} if told_guidance else {}
        self._products = torch.Generator().manual_seed(0)

    @override
    def encode_text(self, prompt: str) -> Conditioning:
        count = min(len(prompt.split()), 75)
        number = float(zlib.crc32(prompt.encode()))  # equal embeddings for equal prompts alone, as a model has them
        span = Span(0, (0, *range(2, 2 + count), 1), range(1, 1 + count), tuple(range(count)))
        return Conditioning(prompt, {"embedding": torch.full((77, 1), number), **self._told}, (span,))

    @override
    def encode_images(self, pixels: Tensor) -> Tensor:
        count, height, width, _ = pixels.shape
        return torch.zeros(count, self.latent_channels, height // self.latent_scale, width // self.latent_scale)

    @override
    def decode_latents(self, latents: Tensor) -> Tensor:
        height, width = latents.shape[-2] * self.latent_scale, latents.shape[-1] * self.latent_scale
        return torch.zeros((len(latents), height, width, 3), dtype=torch.uint8)

    @override
    def decode_gradient(self, latents: Tensor, function: PixelFunction) -> tuple[Tensor, Tensor]:
        """The function is not asked: a learned one would be loaded for it."""
        return latents.new_zeros(()), torch.zeros_like(latents)

    @override
    def denoise(self, call: NetworkCall) -> NetworkAnswer:
        """What is watched is zero everywhere: an editor's masks come out empty, which leaves its row count as it is."""
        rows, _, height, width = call.latents.shape
        # Far from any target, so that what stops early where it has arrived does not: the count is an upper bound. For
        # the same reason the corner tells one text from another: a mask of where two texts differ is not empty.
        output = torch.full_like(call.latents, 0.0 if call.cotangents is None else 1e3)
        output[:, :, 0, 0] += torch.stack([one.embedding[0, 0] for one in call.conditioning])[:, None] / 2**32
        return NetworkAnswer(
            predictions=prediction_of("epsilon", output, call.latents, call.levels),
            attention=None if call.watch is None else torch.zeros(rows, call.plan.sums, height // 4, width // 4),
            recorded={room.where: self._written(room, rows // call.group, height, width) for room in call.plan.records},
            embedding_grads=None
            if call.cotangents is None
            else torch.zeros_like(torch.stack([one.embedding for one in call.conditioning])),
        )

    def _written(self, room: Records, groups: int, height: int, width: int) -> Tensor:
        """What a block writes: nothing, or ones where places are compared by it."""
        block = self.offers.openings.recordable(room.where)
        assert block is not None
        made = torch.ones if isinstance(block, DecoderBlock) else torch.zeros
        return made(groups * room.slots, block.channels, -(-height // block.factor), -(-width // block.factor))

    @override
    def product(self, call: Product) -> Tensor:
        """Other numbers at every call: an iteration that ends where nothing changes any more never does."""
        assert self.offers.bottleneck is not None
        rows, channels, height, width = call.latents.shape
        shape = self.offers.bottleneck.shape(height, width) if call.mode == "push" else (channels, height, width)
        return torch.randn((rows, *shape), generator=self._products)
