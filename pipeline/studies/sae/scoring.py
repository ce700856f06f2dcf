"""How much of what a network predicts its autoencoders keep: `shardedit sae score`.

A block's write is replaced by what its codes make of it, or by nothing at all; the loss of the prediction is compared
with that of the untouched network. 1: the codes hold all that matters to the prediction; 0: no more than nothing does.
Cost: three network rows for each image and autoencoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.common.showing import public_url
from pipeline.engine.blocks import blocks_of
from pipeline.engine.calls import Denoise, Denoised, EncodeImage, EncodeText, Steps
from pipeline.engine.controls import Add, Adds, Control, Plan, Record, Records, Transformer
from pipeline.engine.engine import Engine
from pipeline.errors import ModelError
from pipeline.interventions import BlockAutoencoder
from pipeline.inversion.base import draw_from
from pipeline.models.loading import load_backbone
from pipeline.reading.libraries import options_text, read_library
from pipeline.reading.storage import open_fs
from pipeline.seeds import seed_for
from pipeline.studies.sae.config import ScoreConfig
from pipeline.studies.sae.labelling import entries_of
from pipeline.studies.sae.recorded import RecordedImage, RecordedRuns
from pipeline.writing.files import put

SCORES_FILE = "scores.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Mean squared errors of the predicted noise, summed over images."""

    untouched: float
    coded: float  # a block's write is what its codes make of it
    removed: float  # it is nothing

    @property
    def recovered(self) -> float | None:
        """Share of what the block is worth that its codes keep; None: it is worth nothing."""
        worth = self.removed - self.untouched
        return (self.removed - self.coded) / worth if worth > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What came of a scoring."""

    folder: str
    images: int
    losses: dict[str, Losses]  # by column


def score(config: ScoreConfig) -> Score:
    """Score every autoencoder of a library; written beside them.

    Raises:
        ModelError: the model is another one than the library's.
        SinkError: there are no recordings.
    """
    runs = RecordedRuns(config.recordings)
    backbone = load_backbone(config.model)
    if backbone.record.digest != runs.model.digest:
        raise ModelError(
            f"model.name '{config.model.name}' ({backbone.record.digest}) is not what the images were made by, "
            f"'{runs.model.name}' ({runs.model.digest}). Name that"
        )
    library = read_library(config.library.folder, options_text(config.library.storage_options), named=False)
    entries = entries_of(library, runs)
    engine = Engine(backbone, call_size=config.call_size)
    blocks = blocks_of(backbone.offers.openings)
    images = list(_first(runs.pictures(), config.images))
    losses: dict[str, Losses] = {}
    for key, entry in entries.items():
        timestep = runs.timestep(key)
        asked = [losses_of(image, entry, blocks[key.block], backbone, timestep) for image in images]
        found = []
        for finished in engine.run(asked):
            if finished.error is not None:
                raise finished.error
            found.append((finished.index, finished.value))
        losses[key.column] = _summed([one for _, one in sorted(found, key=lambda pair: pair[0])])
    fs, root = open_fs(config.library.folder, config.library.storage_options)
    said = {
        name: {"untouched": one.untouched, "coded": one.coded, "removed": one.removed, "recovered": one.recovered}
        for name, one in losses.items()
    }
    put(fs, f"{root}/{SCORES_FILE}", (json.dumps({"images": len(images), "losses": said}, indent=1) + "\n").encode())
    return Score(folder=public_url(config.library.folder), images=len(images), losses=losses)


def _first(images: Iterator[RecordedImage], most: int) -> Iterator[RecordedImage]:
    for number, image in enumerate(images):
        if number == most:
            return
        yield image


def _summed(some: Sequence[Losses]) -> Losses:
    return Losses(
        untouched=sum(one.untouched for one in some),
        coded=sum(one.coded for one in some),
        removed=sum(one.removed for one in some),
    )


def losses_of(
    image: RecordedImage, entry: BlockAutoencoder, block: Transformer, backbone: Any, timestep: float
) -> Steps[Losses]:
    """The losses of one image at one timestep, under its prompt, with noise of its own."""
    (prompt,) = yield EncodeText((image.prompt,))
    clean: Tensor = yield EncodeImage(image.pixels)
    level = backbone.schedule.level(int(timestep))
    noise = draw_from(seed_for(0, image.id, "score"), tuple(clean.shape), clean.dtype)()
    noisy = level.noised(clean, noise)
    where = (block.place, block.index_in_place)
    recording = Control((Record(0, where),), Plan(records=(Records(where=where, slots=1),)))
    denoised: Denoised = yield Denoise(noisy[None], [level], [prompt], control=recording)
    assert denoised.seen is not None, "it was asked for"
    written = denoised.seen.recorded[0].float()
    found = [_loss(denoised, noise)]
    for instead in (_coded(entry, written), torch.zeros_like(written)):
        replaced: Denoised = yield Denoise(noisy[None], [level], [prompt], control=_adding(instead - written, where))
        found.append(_loss(replaced, noise))
    return Losses(untouched=found[0], coded=found[1], removed=found[2])


def _loss(denoised: Denoised, noise: Tensor) -> float:
    return float((denoised.predictions.noise[0] - noise).square().mean())


@torch.no_grad()
def _coded(entry: BlockAutoencoder, written: Tensor) -> Tensor:
    """What codes make of a block's write (D, h', w')."""
    autoencoder = entry.autoencoder
    vectors = written.flatten(1).mT.to(autoencoder.encoder)
    return autoencoder.decode(autoencoder.encode(vectors)).mT.reshape(written.shape).to(written)


def _adding(change: Tensor, where: Any) -> Control:
    """Adds (D, h', w') to a block's output: a direction for each place, whose map is that place alone."""
    size, height, width = change.shape
    count = height * width
    add = Add(
        row=0, where=where, directions=change.reshape(size, count).mT, maps=torch.eye(count).view(count, height, width)
    )
    return Control((add,), Plan(adds=(Adds(where=where, slots=1, directions=count),)))
