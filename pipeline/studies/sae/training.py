"""A training of sparse autoencoders from its begin to its end: `shardedit sae train`.

One autoencoder for each block, time and branch that was recorded, all of them on one device, from one reading of the
rows. The state of all is written every so many batches as one file; the same command goes on from there, to the same
bits. With several workers each has a part of every batch, and all hold the same state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.common import stopping
from pipeline.common.showing import public_url
from pipeline.diffusion.sparse_autoencoder import explained_variance, initial
from pipeline.diffusion.sparse_training import ALONE, SparseLoss, SparseTraining, Workers, variance_scale
from pipeline.errors import ClusterError, SinkError
from pipeline.models.sparse_autoencoders import Origin, as_file
from pipeline.reading.storage import open_fs
from pipeline.recordings import RecordingKey
from pipeline.studies.sae.config import TrainConfig
from pipeline.studies.sae.recorded import RecordedRuns
from pipeline.studies.sae.stream import Cursor, Vectors, VectorStream, order_of
from pipeline.writing.files import get, put

RECORD_FILE = "training.json"
STATE_FILE = "_training/state.safetensors"
SAMPLE = 40_960  # vectors that the scale is taken of, and the figures at the end
SILENT_FOR = (100_000, 1_000_000, 10_000_000)  # vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How well an autoencoder does on images that it has not learnt from."""

    explained_variance: float
    l0: float  # mean number of codes of a place
    dead: dict[str, float]  # share of features that were silent for so many vectors of the training


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a training."""

    folder: str
    batches: int
    batches_now: int  # by this command
    figures: dict[str, Figures]  # by column


@dataclass(slots=True, eq=False)
class Progress:
    """Autoencoders in training, and where their stream is."""

    trainings: dict[RecordingKey, SparseTraining]
    cursor: Cursor
    batches: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)  # by column, of the last batch


def train(config: TrainConfig, workers: Workers = ALONE, rank: int = 0, count: int = 1) -> Trained:
    """Train what is missing; write autoencoders and figures.

    Args:
        config: the training.
        workers: that share every batch.
        rank: of this one; the first alone writes.
        count: of workers.

    Raises:
        SinkError: there are no recordings, they do not belong together, or the folder holds another training.
    """
    runs = RecordedRuns(config.recordings)
    keys, model = runs.keys, runs.model
    timesteps = {key: runs.timestep(key) for key in keys}
    stream = VectorStream(runs, keys, config.training)
    store = _Store(config, hashlib.sha256((config.hash + runs.fingerprint()).encode()).hexdigest()[:16])
    if rank == 0:
        store.claim()
    device = torch.device("cuda" if config.run.gpu else "cpu")
    progress = store.read(keys, device) or _begin(config, stream, device)
    before = progress.batches
    _go_on(config, stream, progress, workers, rank, count, store.write if rank == 0 else lambda _: None)
    figures = {
        key.column: _figures(progress.trainings[key], vectors, config.training.batch_size)
        for key, vectors in stream.held_out(SAMPLE).items()
    }
    if rank == 0:
        for key, training in progress.trainings.items():
            origin = Origin(
                block=key.block,
                branch=key.branch,
                timestep=timesteps[key],
                time=key.time,
                model=model.name,
                model_digest=model.digest,
            )
            store.put(f"{key.column}.safetensors", as_file(training.autoencoder, training.last_fired, origin))
        store.finish(progress.batches, figures)
    return Trained(
        folder=config.sink.folder, batches=progress.batches, batches_now=progress.batches - before, figures=figures
    )


def run_training(config: TrainConfig) -> Trained:
    """Train in this process, or in workers of Ray Train.

    Raises:
        ClusterError: Ray Train is not there, or failed; and see `train`.
    """
    if config.run.engine == "local":
        return train(config)
    try:
        from pipeline.running.on_ray.training import run_workers
    except ModuleNotFoundError as error:
        raise ClusterError(
            "run.engine is ray, and Ray is not installed. Install it (pip install 'shardedit[cluster]' 'ray[train]'), "
            "or set run.engine: local"
        ) from error
    before = _Store(config, "").batches
    run_workers(partial(_work, config), config.run.workers, gpu=config.run.gpu)
    store = _Store(config, "")
    return Trained(
        folder=config.sink.folder, batches=store.batches, batches_now=store.batches - before, figures=store.figures
    )


def _work(config: TrainConfig, workers: Workers, rank: int, count: int) -> None:
    train(config, workers, rank, count)


def total_batches(config: TrainConfig) -> int:
    """How many batches a training has."""
    return -(-config.training.vectors // config.training.batch_size)


def _go_on(
    config: TrainConfig,
    stream: VectorStream,
    progress: Progress,
    workers: Workers,
    rank: int,
    count: int,
    write: Callable[[Progress], None],
) -> None:
    """Learn batch by batch, to the end."""
    wanted, size = total_batches(config), config.training.batch_size
    if progress.batches >= wanted:
        return
    mine = slice(rank * size // count, (rank + 1) * size // count)
    for cursor, vectors in stream.batches(progress.cursor):
        stopping.check()
        for key, training in progress.trainings.items():
            losses = training.update(vectors[key][mine].to(training.autoencoder.bias.device), workers)
            progress.losses[key.column] = list(losses)
        progress.cursor, progress.batches = cursor, progress.batches + 1
        if progress.batches == wanted or progress.batches % config.training.checkpoint_every == 0:
            write(progress)
        if progress.batches == wanted:
            return


def _begin(config: TrainConfig, stream: VectorStream, device: torch.device) -> Progress:
    """Autoencoders before their first batch."""
    sample = _sample(stream)
    settings, trainings = config.training, {}
    for number, key in enumerate(stream.keys):
        size = sample[key].shape[1]
        generator = torch.Generator().manual_seed(_seed(settings.seed, number))
        features = config.autoencoder.num_features or 4 * size
        if config.autoencoder.k > features:
            raise SinkError(f"autoencoder.k {config.autoencoder.k} is more than its {features} features. Lower it")
        try:
            scale = variance_scale(sample[key])
        except ValueError as error:
            raise SinkError(f"{key.block} at time {key.time:g} ({key.branch}): {error}") from None
        made = initial(sample[key].to(device), features, config.autoencoder.k, generator)
        trainings[key] = SparseTraining.begin(made, _loss(config, scale))
    return Progress(trainings, Cursor())


def _sample(stream: VectorStream) -> Vectors:
    """The first vectors of the stream's first part, shuffled as they are."""
    order = order_of(len(stream.runs.parts), stream.settings.seed, 0).tolist()
    _, vectors = stream.part(0, order, 0)
    return {key: one[:SAMPLE] for key, one in vectors.items()}


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\x1fweights\x1f{number}".encode()).digest()[:8], "big") >> 1


def _loss(config: TrainConfig, scale: float) -> SparseLoss:
    settings = config.training
    return SparseLoss(
        scale=scale,
        dead_after=max(1, settings.dead_after // settings.batch_size),
        aux_k=settings.aux_k,
        aux_coefficient=settings.aux_coefficient,
        learning_rate=settings.learning_rate,
        adam_eps=settings.adam_eps,
    )


@torch.no_grad()
def _figures(training: SparseTraining, vectors: Tensor, batch_size: int) -> Figures:
    autoencoder, size = training.autoencoder, 4096
    vectors = vectors.to(autoencoder.bias.device)
    parts = [autoencoder.encode(some) for some in vectors.split(size)]
    decoded = torch.cat([autoencoder.decode(codes) for codes in parts])
    counts = torch.cat([(codes.values > 0).sum(dim=1) for codes in parts])
    silent = training.last_fired * batch_size
    return Figures(
        explained_variance=explained_variance(vectors, decoded),
        l0=float(counts.double().mean()),
        dead={f"{most:.0e}": float((silent > most).double().mean()) for most in SILENT_FOR},
    )


class _Store:
    """The folder of a training."""

    def __init__(self, config: TrainConfig, digest: str) -> None:
        self.config, self.digest = config, digest
        self.fs, self.root = open_fs(config.sink.folder, config.sink.storage_options)

    @property
    def _said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(get(self.fs, f"{self.root}/{RECORD_FILE}") or b"{}")
        return found

    @property
    def batches(self) -> int:
        """That a finished training has."""
        return int(self._said.get("batches", 0))

    @property
    def figures(self) -> dict[str, Figures]:
        """Of a finished training."""
        return {name: Figures(**one) for name, one in self._said.get("figures", {}).items()}

    def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        put(self.fs, f"{self.root}/{name}", data)

    def claim(self) -> None:
        """Say what the folder is for, or see that it is for this.

        Raises:
            SinkError: it is for another training.
        """
        before = get(self.fs, f"{self.root}/{RECORD_FILE}")
        if before is None:
            self._record({})
        elif json.loads(before).get("training") != self.digest:
            raise SinkError(
                f"{public_url(self.config.sink.folder)} holds another training: other settings, or other recordings. "
                "Give another sink.folder, or the settings as they were"
            )

    def _record(self, more: dict[str, Any]) -> None:
        secrets = {"sink": {"storage_options"}, "recordings": {"storage_options"}}
        record = {"training": self.digest, "config": self.config.model_dump(mode="json", exclude=secrets), **more}
        self.put(RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode())

    def finish(self, batches: int, figures: dict[str, Figures]) -> None:
        """Write the figures."""
        self._record({"batches": batches, "figures": {name: asdict(one) for name, one in figures.items()}})

    def write(self, progress: Progress) -> None:
        """Write the state of all autoencoders, in one piece."""
        tensors = {
            f"{number}.{name}": tensor.contiguous().cpu()
            for number, training in enumerate(progress.trainings.values())
            for name, tensor in training.state().items()
        }
        said = {
            "training": self.digest,
            "cursor": asdict(progress.cursor),
            "batches": progress.batches,
            "scales": [training.loss.scale for training in progress.trainings.values()],
        }
        self.put(STATE_FILE, save(tensors, {"shardedit": json.dumps(said)}))

    def read(self, keys: list[RecordingKey], device: torch.device) -> Progress | None:
        """What an earlier command left; None: nothing."""
        data = get(self.fs, f"{self.root}/{STATE_FILE}")
        if data is None:
            return None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = json.loads(header["__metadata__"]["shardedit"])
        tensors = load(data)
        trainings = {}
        for number, key in enumerate(keys):
            start = f"{number}."
            state = {
                name.removeprefix(start): one.to(device) for name, one in tensors.items() if name.startswith(start)
            }
            loss = _loss(self.config, said["scales"][number])
            trainings[key] = SparseTraining.of_state(state, self.config.autoencoder.k, loss)
        return Progress(trainings, Cursor(**said["cursor"]), said["batches"])
