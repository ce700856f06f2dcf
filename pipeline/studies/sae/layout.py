"""How early the layout of an image can be told: `shardedit sae layout`.

At every recorded time concepts are looked for in what blocks wrote, and compared with where they are in the finished
image. Two questions. Over all images, without being told what an image shows: `concepts`, the weighted codes that tell
each concept against their threshold, by the IoU of all places together. And over the images that show a concept, where
it is: `shown`, the codes that tell its place, and `words`, as in the paper: a place has the mean word vector of its
strongest features, and belongs to the noun that it is nearest to; by the mean IoU of images. Beside either stands its
constant mask: the one region that suits these images best, without a look at any.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.common.showing import public_url
from pipeline.errors import ModelError
from pipeline.interventions import BlockAutoencoder, Telling
from pipeline.reading.libraries import options_text, read_library
from pipeline.reading.storage import open_fs
from pipeline.recordings import RecordingKey
from pipeline.studies.plots import Line, plot
from pipeline.studies.sae.codes import CodedImages, iou_of, mean_iou
from pipeline.studies.sae.config import LayoutConfig
from pipeline.studies.sae.labelling import DICTIONARY_FILE, collect, entries_of, split
from pipeline.studies.sae.plugins import word_vectors
from pipeline.studies.sae.recorded import RecordedRuns
from pipeline.writing.files import get, put
from pipeline.writing.parquet import render_parquet

STRONGEST = 5  # features of a place that its word vector is made of
COSINES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # thresholds of `words` that are tried
LEVELS = tuple(step / 20 for step in range(1, 20))  # shares of images that are tried for the constant mask
TABLE = pa.schema(
    {
        "block": pa.string(),  # "best": of each concept the block that told it best where it was labelled
        "time": pa.float64(),
        "branch": pa.string(),
        "concept": pa.string(),
        "concepts_iou": pa.float64(),
        "constant_iou": pa.float64(),
        "shown_iou": pa.float64(),
        "words_iou": pa.float64(),
        "shown_constant_iou": pa.float64(),
        "images": pa.int64(),  # that show it
    }
)
OVER_ALL = ("concepts_iou", "constant_iou")
PLOTTED = {
    "best": "concepts_iou",
    "constant": "constant_iou",
    "shown: best": "shown_iou",
    "shown: words": "words_iou",
    "shown: constant": "shown_constant_iou",
}
OVER_SHOWN = ("shown_iou", "words_iou", "shown_constant_iou")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What came of a comparison."""

    folder: str
    images: int
    by_time: list[dict[str, float]]  # means over concepts, noisiest first


def compare_layouts(config: LayoutConfig) -> Layout:
    """Write the table and the plot.

    Raises:
        SinkError: recordings are missing, or only in part.
        ModelError: library and recordings do not belong together, or nothing is labelled.
    """
    runs = RecordedRuns(config.recordings)
    library = read_library(config.library.folder, options_text(config.library.storage_options))
    entries = entries_of(library, runs)
    if not library.names:
        raise ModelError(f"'{library.where}' has no dictionary. Run `shardedit sae label` first")
    found = collect(runs, entries, config.labels)
    embeddings = embeddings_of(config, entries)
    rows = []
    for key, entry in entries.items():
        images = found.of(key, entry.autoencoder.num_features)
        rows += rows_of(key, entry, images, embeddings[key], config.words)
    rows += best_rows(rows, entries)
    by_time = means(rows)
    fs, root = open_fs(config.sink.folder, config.sink.storage_options)
    put(fs, f"{root}/layout.parquet", render_parquet(rows, TABLE))
    put(fs, f"{root}/layout.json", (json.dumps(by_time, indent=1) + "\n").encode())
    put(fs, f"{root}/layout.png", picture(rows, by_time))
    return Layout(folder=public_url(config.sink.folder), images=len(found.ids), by_time=by_time)


def embeddings_of(config: LayoutConfig, entries: Mapping[RecordingKey, BlockAutoencoder]) -> dict[RecordingKey, Tensor]:
    """(F, 300) of every autoencoder: the word vectors of its features, zero for those without a tag."""
    fs, root = open_fs(config.library.folder, config.library.storage_options)
    data = get(fs, f"{root}/{DICTIONARY_FILE}")
    if data is None:
        raise ModelError(f"'{root}' has no {DICTIONARY_FILE}. Run `shardedit sae label` first")
    columns = ["block", "time", "branch", "feature", "embedding"]
    found: dict[RecordingKey, Tensor] = {}
    for row in pq.read_table(io.BytesIO(data), columns=columns).to_pylist():
        key = RecordingKey(row["block"], row["time"], row["branch"])
        if key in entries and row["embedding"]:
            blank = torch.zeros((entries[key].autoencoder.num_features, len(row["embedding"])))
            found.setdefault(key, blank)[row["feature"]] = torch.tensor(row["embedding"])
    return {key: found.get(key, torch.zeros((entry.autoencoder.num_features, 1))) for key, entry in entries.items()}


def rows_of(
    key: RecordingKey, entry: BlockAutoencoder, images: CodedImages, embeddings: Tensor, words: str
) -> list[dict[str, Any]]:
    """A row for each concept that some image shows."""
    vectors = conceptual(images, embeddings)
    nearest = nearest_words(vectors, images, words)
    rows = []
    for tag, name in enumerate(images.tags):
        covered = images.covered[:, tag].view(len(images.ids), -1)
        shown = covered.any(dim=1)
        if not bool(shown.any()):
            continue
        concept = entry.concepts.get(name)
        told, placed = (
            (None, None) if concept is None else (_found(images, one) for one in (concept.telling, concept.placing))
        )
        rows.append(
            {
                "block": key.block,
                "time": key.time,
                "branch": key.branch,
                "concept": name,
                "concepts_iou": None if told is None else float(iou_of(told, covered.flatten())),
                "constant_iou": constant_iou(covered, _joint_iou),
                "shown_iou": None
                if placed is None
                else float(mean_iou(placed.view_as(covered)[shown], covered[shown])),
                "words_iou": best_words_iou(nearest, tag, covered, shown, images.ids),
                "shown_constant_iou": constant_iou(covered[shown], mean_iou),
                "images": int(shown.sum()),
            }
        )
    return rows


def _found(images: CodedImages, telling: Telling) -> Tensor:
    """(M,) in {0, 1}: places whose score is above a threshold."""
    return (images.score(telling.features, telling.weights) > telling.threshold).float()


def _joint_iou(found: Tensor, covered: Tensor) -> Tensor:
    """IoU of the places of all images together."""
    return iou_of(found.flatten(), covered.flatten())


def conceptual(images: CodedImages, embeddings: Tensor) -> Tensor:
    """(M, 300): the mean word vector of each place's strongest features that have a tag."""
    has_tag = embeddings.any(dim=1)
    values = torch.where(has_tag[images.features], images.values, torch.zeros_like(images.values))
    strongest = values.topk(min(STRONGEST, values.shape[1]), dim=1)
    chosen = images.features.gather(1, strongest.indices)
    weight = (strongest.values > 0).float()
    return torch.einsum("mk,mkd->md", weight, embeddings[chosen]) / weight.sum(dim=1, keepdim=True).clamp_min(1.0)


def nearest_words(vectors: Tensor, images: CodedImages, words: str) -> tuple[Tensor, Tensor]:
    """Of each place the tag of its image that its word vector is nearest to, and their cosine: (M,) each.

    The tags of an image stand for its prompt's nouns.
    """
    known = torch.stack([torch.from_numpy(word_vectors(words)(tag)).float() for tag in images.tags])
    if vectors.shape[1] != known.shape[1]:  # nothing is labelled
        return torch.zeros(len(vectors), dtype=torch.int64), torch.zeros(len(vectors))
    cosines = normalize(vectors, dim=1) @ normalize(known, dim=1).mT
    shown = images.covered.view(len(images.ids), images.places, -1).any(dim=1)  # (images, T)
    cosines = cosines.masked_fill(~shown.repeat_interleave(images.places, dim=0), -1.0)
    best = cosines.max(dim=1)
    return best.indices, best.values


def best_words_iou(
    nearest: tuple[Tensor, Tensor], tag: int, covered: Tensor, shown: Tensor, ids: Sequence[str]
) -> float | None:
    """With the cosine that suits half of the images best, on the other half; None where a half shows nothing."""
    tags, cosines = (one.view_as(covered) for one in nearest)
    chosen, judged = (
        torch.tensor([number for number in part if bool(shown[number])], dtype=torch.int64) for part in split(ids, 0.5)
    )
    if not len(chosen) or not len(judged):
        return None

    def iou(some: Tensor, limit: float) -> float:
        return float(mean_iou(((tags[some] == tag) & (cosines[some] > limit)).float(), covered[some]))

    limit = max(COSINES, key=lambda one: iou(chosen, one))
    return iou(judged, limit)


def constant_iou(covered: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Of the one mask that suits these images (images, places) best: places that so many of them cover."""
    mean = covered.mean(dim=0)
    levels = [level * float(mean.max()) for level in LEVELS]
    return max(float(measure((mean >= level).float().expand_as(covered), covered)) for level in levels)


def best_rows(rows: Sequence[dict[str, Any]], entries: Mapping[RecordingKey, BlockAutoencoder]) -> list[dict[str, Any]]:
    """Of every time and concept what the block came to that was best, for either question, where it was labelled."""
    best: dict[tuple[float, str], dict[str, Any]] = {}
    known = [row for row in rows if row["concept"] in entries[_key(row)].concepts]
    for row in known:
        best.setdefault((row["time"], row["concept"]), {**row, "block": "best"})
    for (time, name), found in best.items():
        some = [row for row in known if (row["time"], row["concept"]) == (time, name)]
        told = max(some, key=lambda row: entries[_key(row)].concepts[name].telling.iou)
        placed = max(some, key=lambda row: entries[_key(row)].concepts[name].placing.iou)
        found |= {column: told[column] for column in OVER_ALL} | {column: placed[column] for column in OVER_SHOWN}
    return list(best.values())


def _key(row: Mapping[str, Any]) -> RecordingKey:
    return RecordingKey(row["block"], row["time"], row["branch"])


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Means over concepts of the best blocks, by time, from noise on."""
    found = []
    for time in sorted({row["time"] for row in rows}, reverse=True):
        some = [row for row in rows if row["time"] == time and row["block"] == "best"]
        columns = {
            column: [row[column] for row in some if row[column] is not None] for column in (*OVER_ALL, *OVER_SHOWN)
        }
        found.append({"time": time, **{column: fmean(values) for column, values in columns.items() if values}})
    return found


def picture(rows: Sequence[Mapping[str, Any]], by_time: Sequence[Mapping[str, float]]) -> bytes:
    """IoU against time, from noise (0) to the image (1), for each block and the best ones."""
    lines = []
    for block in sorted({row["block"] for row in rows} - {"best"}):
        points = []
        for time in sorted({row["time"] for row in rows}):
            some = [
                row["concepts_iou"]
                for row in rows
                if (row["block"], row["time"]) == (block, time) and row["concepts_iou"] is not None
            ]
            if some:
                points.append((1.0 - time, fmean(some)))
        if points:
            lines.append(Line(block.replace("_blocks", "").replace(".attentions", ""), points))
    for name, column in PLOTTED.items():
        points = [(1.0 - one["time"], one[column]) for one in by_time if column in one]
        if points:
            lines.append(Line(name, points))
    return plot(lines, "share of the sampling that is done", "IoU with the finished image")
