"""The configurations of `shardedit sae train`, `label` and `layout`."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.interventions import BlockName, GuidanceBranch, Share
from pipeline.recordings import RecordingKey
from pipeline.settings.sections import FolderSink, ModelConfig, OneOrMany, Section, StorageOptions

Count = Annotated[int, Field(ge=1)]


class Recordings(Section):
    """Folders of runs that recorded, and which of it is read."""

    folders: OneOrMany = Field(min_length=1)
    """Folders of runs of `shardedit sae collect`, all of one model."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""
    blocks: tuple[BlockName, ...] = ()
    """Of these blocks; none: of all that were recorded."""
    times: tuple[Share, ...] = ()
    """At these times; none: at all that were recorded."""
    branches: tuple[GuidanceBranch, ...] = ()
    """Of these branches; none: of all that were recorded."""

    @field_validator("folders", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def wants(self, key: RecordingKey) -> bool:
        """Whether a recording is one of them."""
        return (
            (not self.blocks or key.block in self.blocks)
            and (not self.times or key.time in self.times)
            and (not self.branches or key.branch in self.branches)
        )


class AutoencoderSettings(Section):
    """How large, and how sparse."""

    num_features: Count | None = None
    """F: features; none: four times the block's channels."""
    k: Count = 10
    """Features that a place may have."""


class TrainingSettings(Section):
    """How an autoencoder learns."""

    vectors: Count
    """Vectors that are seen in all, each image's several times if need be: 51,200,000 in the paper."""
    batch_size: Count = 4096
    """Vectors of a batch, of all workers together."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Of Adam."""
    adam_eps: float = Field(default=6.25e-10, gt=0)
    """Of Adam."""
    aux_k: int = Field(default=256, ge=0)
    """Dead features that learn what living ones leave, for each vector; 0: dead ones stay so."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    """Weight of that."""
    dead_after: Count = 10_000_000
    """Vectors without a code after which a feature counts as dead."""
    shuffle_vectors: Count = 65_536
    """Vectors that are shuffled together: places of one image are alike. At least 50 images, and two batches."""
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of the images that is not learnt from: figures are taken of them."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order, the held out images and the first weights."""
    checkpoint_every: Count = 1000
    """Batches after which the state is written: what a kill loses at most."""

    @model_validator(mode="after")
    def _shuffles_enough(self) -> TrainingSettings:
        if self.shuffle_vectors < 2 * self.batch_size:
            raise ValueError(
                f"shuffle_vectors {self.shuffle_vectors} is less than two batches of {self.batch_size}: what is left "
                "over of each part would be lost. Raise it, or lower batch_size"
            )
        return self


class TrainRun(Section):
    """Who does the work."""

    engine: Literal["local", "ray"] = "local"
    """local: this process; ray: workers of Ray Train, which share every batch."""
    workers: Count = 1
    """Of Ray Train. What comes out does not depend on it, but for rounding."""
    gpu: bool = False
    """Whether each worker takes a GPU."""


class TrainConfig(Section):
    """Training of an autoencoder for each block, time and branch that was recorded."""

    recordings: Recordings
    """What is learnt from."""
    autoencoder: AutoencoderSettings = Field(default_factory=AutoencoderSettings)
    """How large, and how sparse."""
    training: TrainingSettings
    """How it learns."""
    sink: FolderSink
    """Where autoencoders go: the library that the editor reads."""
    run: TrainRun = Field(default_factory=TrainRun)
    """Who does the work."""

    @model_validator(mode="after")
    def _workers_have_a_batch_each(self) -> TrainConfig:
        if self.run.engine == "local" and self.run.workers > 1:
            raise ValueError("run.workers is for run.engine ray. Set run.engine: ray, or leave workers out")
        if self.training.batch_size < self.run.workers:
            raise ValueError(
                f"a batch of {self.training.batch_size} has no part for each of {self.run.workers} workers"
            )
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of what decides results, first 16 hexadecimal digits."""
        data = self.model_dump(mode="json", exclude={"sink": True, "run": True, "recordings": {"storage_options"}})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class LabelConfig(Section):
    """Names for the features of a library, by what images of known regions show."""

    recordings: Recordings
    """Whole maps: runs with editing.record.positions none."""
    library: FolderSink
    """The autoencoders of `shardedit sae train`; the dictionary is written beside them."""
    labels: str = "attended"
    """Who says where things are in an image. attended: the words of its prompt, where they were attended to
    (editing.record.attention). Otherwise a function of a module, package.module:name, called with an image (H, W,
    3) uint8 and its prompt; it returns the regions of what is to be seen, (H, W) bool, by tag."""
    word_vectors: str = "hash"
    """Who says which words are alike: hash (equal words alone), or package.module:name, called with a word, which
    returns a vector of 300 numbers."""
    set_size: Annotated[int, Field(ge=1, le=64)] = 4
    """Features that a concept may have, with signs."""
    template_size: Annotated[int, Field(ge=0, le=1024)] = 0
    """Features that each place of a concept's template keeps, which interventions of form: template write; 0: there are
    no templates. 32 are three times as many as a place of an image has."""
    select: float = Field(default=0.5, gt=0, lt=1)
    """Share of the images on which features and thresholds are chosen; the figures are of the others."""
    gallery_images: Count = 8
    """Images of each concept on the gallery page."""


class LayoutConfig(Section):
    """How early the layout of an image can be told."""

    recordings: Recordings
    """Whole maps of images that neither training nor labelling has seen."""
    library: FolderSink
    """Autoencoders and dictionary."""
    labels: str = "attended"
    """As that of `label`: where things are in the finished image."""
    words: str = "hash"
    """As `label`'s word_vectors."""
    sink: FolderSink
    """Where table and plot go."""


class ScoreConfig(Section):
    """How much of the network's prediction autoencoders keep."""

    recordings: Recordings
    """Runs whose finished images and prompts are noised again."""
    library: FolderSink
    """Autoencoders; the scores are written beside them."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """The model that recorded."""
    images: Count = 64
    """Images at most."""
    call_size: Count = 16
    """Rows of a network call."""
