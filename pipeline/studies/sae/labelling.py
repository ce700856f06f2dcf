"""Names for features: `shardedit sae label`.

Whole maps of labelled images are encoded; every image votes for the tag whose region each of its features covers best.
And of every tag it is said by which feature, or small signed set of features, it is told best: chosen on some images,
judged on the others. Written beside the autoencoders: dictionary.parquet has a row for each feature, concepts.parquet
one for each tag and autoencoder, templates.parquet what tags look like place by place, where that is asked for: the
editor reads both. gallery.html shows the images that have most of each concept.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipeline.common import stopping
from pipeline.common.showing import public_url
from pipeline.errors import ModelError, SinkError
from pipeline.interventions import Autoencoders, BlockAutoencoder
from pipeline.reading.libraries import CONCEPT_COLUMNS, CONCEPTS_FILE, options_text, read_library
from pipeline.reading.storage import open_fs
from pipeline.reading.templates import TEMPLATES, TEMPLATES_FILE, row_of
from pipeline.recordings import RecordingKey
from pipeline.studies.sae.codes import (
    CodedImages,
    amounts_of,
    best_place_threshold,
    best_threshold,
    chosen_set,
    coded,
    covered_places,
    iou_of,
    mean_iou,
    single_ious,
)
from pipeline.studies.sae.config import LabelConfig
from pipeline.studies.sae.gallery import GalleryEntry, page_of
from pipeline.studies.sae.plugins import ATTENDED, Labels, WordVectors, attended_regions, named, word_vectors
from pipeline.studies.sae.recorded import RecordedRuns
from pipeline.studies.sae.templates import templates_of
from pipeline.writing.files import put
from pipeline.writing.parquet import render_parquet

DICTIONARY_FILE, GALLERY_FILE = "dictionary.parquet", "gallery.html"
THUMBNAIL = 96  # pixels of a side
TOP_IMAGES = 8  # of a feature
DICTIONARY = pa.schema(
    {
        "block": pa.string(),
        "time": pa.float64(),
        "branch": pa.string(),
        "feature": pa.int64(),
        "tags": pa.list_(pa.string()),  # the most votes first; none where nobody voted
        "weights": pa.list_(pa.float64()),  # share of the votes
        "votes": pa.int64(),  # images in which it covers a tag's region best
        "mean_iou": pa.float64(),  # of these votes
        "density": pa.float64(),  # share of the places that have it
        "embedding": pa.list_(pa.float32()),  # mean word vector of the tags, by votes; none without
        "top_images": pa.list_(pa.string()),  # ids, by its mean code
    }
)
CONCEPTS = pa.schema(
    {
        **CONCEPT_COLUMNS,
        "single_feature": pa.int64(),
        "single_threshold": pa.float64(),
        "single_iou": pa.float64(),
        "set_iou": pa.float64(),
        "images": pa.int64(),  # that show it, of those that it was judged by
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """What came of a labelling."""

    folder: str
    images: int
    tags: int
    named_features: int
    found_by_one: int  # tags that one feature tells at an IoU of at least a half
    found_by_set: int


@dataclass(slots=True, eq=False)
class Collected:
    """Codes and regions of images, as they come in."""

    ids: list[str] = field(default_factory=list)
    codes: dict[RecordingKey, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    grids: dict[RecordingKey, tuple[int, int]] = field(default_factory=dict)
    covered: dict[tuple[int, int], list[dict[str, Tensor]]] = field(default_factory=dict)  # by grid, of each image
    thumbnails: list[bytes] = field(default_factory=list)

    @property
    def tags(self) -> tuple[str, ...]:
        """Of all images."""
        return tuple(sorted({tag for images in self.covered.values() for one in images for tag in one}))

    def of(self, key: RecordingKey, num_features: int) -> CodedImages:
        """All images by one autoencoder."""
        tags, grid = self.tags, self.grids[key]
        empty = torch.zeros(grid[0] * grid[1])
        shares = [torch.stack([one.get(tag, empty) for tag in tags], dim=1) for one in self.covered[grid]]
        return CodedImages(
            ids=tuple(self.ids),
            grid=grid,
            features=torch.cat([features for features, _ in self.codes[key]]),
            values=torch.cat([values for _, values in self.codes[key]]),
            num_features=num_features,
            tags=tags,
            covered=torch.cat(shares),
        )


def entries_of(library: Autoencoders, runs: RecordedRuns) -> dict[RecordingKey, BlockAutoencoder]:
    """The autoencoder of everything that was recorded, as far as there is one.

    Raises:
        ModelError: they are of another model, or there is none of anything that was recorded.
    """
    model, found = runs.model, {}
    for key in runs.keys:
        timestep = runs.timestep(key)
        for entry in library.entries:
            if (entry.block, entry.branch) != (key.block, key.branch) or entry.timestep not in (None, timestep):
                continue
            if entry.model_digest not in ("", model.digest):
                raise ModelError(
                    f"'{library.where}' is of the model '{entry.model}' ({entry.model_digest}), and the recordings are "
                    f"of '{model.name}' ({model.digest}). Collect and train with one model"
                )
            found[key] = entry
    if not found:
        theirs = ", ".join(f"{one.block} at {one.timestep} ({one.branch})" for one in library.entries)
        raise ModelError(
            f"'{library.where}' has no autoencoder of what was recorded: it has {theirs}. Collect these blocks, times "
            "and branches, with as many steps"
        )
    return found


def collect(runs: RecordedRuns, entries: dict[RecordingKey, BlockAutoencoder], where: str) -> Collected:
    """Encode and label every image.

    Args:
        runs: whole maps.
        entries: autoencoders of what was recorded.
        where: who labels: `ATTENDED`, or a function's name.
    """
    found = Collected()
    labels: Labels | None = None if where == ATTENDED else named(where, "labels")
    if labels is None and not runs.attention:
        raise SinkError(
            "labels is 'attended', and recordings has no attention. Collect with editing.record.attention: true, or "
            "name a function"
        )
    for image in runs.images():
        stopping.check()
        height, width, _ = image.pixels.shape
        by_attention = attended_regions(image.attended, (height, width))
        regions = by_attention if labels is None else labels(image.pixels, image.prompt)
        found.ids.append(image.id)
        found.thumbnails.append(_thumbnail(image.pixels))
        for key, entry in entries.items():
            written = image.maps[key]
            if len(written) != entry.autoencoder.size:
                raise ModelError(
                    f"the autoencoder of {key.block} is for {entry.autoencoder.size} channels, and {image.id} was "
                    f"recorded with {len(written)}. Train it on these recordings"
                )
            found.codes.setdefault(key, []).append(coded(entry.autoencoder, written))
            found.grids[key] = (written.shape[1], written.shape[2])
        for grid in set(found.grids.values()):
            places = {tag: covered_places(region, grid) for tag, region in regions.items()}
            found.covered.setdefault(grid, []).append({tag: one for tag, one in places.items() if one.any()})
    return found


def label(config: LabelConfig) -> Labelled:
    """Write dictionary, concepts and gallery of a library.

    Raises:
        SinkError: recordings are missing, or only in part.
        ModelError: library and recordings do not belong together.
        RecipeError: a plug-in is not there.
    """
    runs = RecordedRuns(config.recordings)
    folder = config.library.folder
    read_library.cache_clear()  # what stands there may have been written since
    library = read_library(folder, options_text(config.library.storage_options), named=False)
    entries = entries_of(library, runs)
    vectors = word_vectors(config.word_vectors)
    found = collect(runs, entries, config.labels)
    chosen, judged = split(found.ids, config.select)
    if not chosen or not judged or not found.tags:
        raise SinkError(
            f"{len(found.ids)} images with {len(found.tags)} tags are too few to choose features on some and judge "
            "them on others. Collect more"
        )
    dictionary: list[dict[str, Any]] = []
    concepts: list[dict[str, Any]] = []
    templates: list[dict[str, Any]] = []
    for key, entry in entries.items():
        stopping.check()
        images = found.of(key, entry.autoencoder.num_features)
        place = {"block": key.block, "time": key.time, "branch": key.branch}
        dictionary += [{**place, **row} for row in dictionary_rows(images, vectors)]
        concepts += [{**place, **row} for row in concept_rows(images.of(chosen), images.of(judged), config.set_size)]
        if config.template_size:
            found_here = templates_of(images, config.template_size)
            templates += [{**place, "concept": name, **row_of(one)} for name, one in found_here]
    gallery = page_of(gallery_of(found, entries, concepts, config.gallery_images))
    fs, root = open_fs(folder, config.library.storage_options)
    put(fs, f"{root}/{DICTIONARY_FILE}", render_parquet(dictionary, DICTIONARY))
    put(fs, f"{root}/{CONCEPTS_FILE}", render_parquet(concepts, CONCEPTS))
    put(fs, f"{root}/{TEMPLATES_FILE}", render_parquet(templates, TEMPLATES))  # empty ones replace those of before
    put(fs, f"{root}/{GALLERY_FILE}", gallery.encode())
    read_library.cache_clear()
    return Labelled(
        folder=public_url(folder),
        images=len(found.ids),
        tags=len(found.tags),
        named_features=sum(bool(row["tags"]) for row in dictionary),
        found_by_one=_found(concepts, "single_iou"),
        found_by_set=_found(concepts, "set_iou"),
    )


def _found(concepts: Sequence[dict[str, Any]], column: str) -> int:
    """Tags that some autoencoder tells, the one that was best where it was chosen."""
    best: dict[str, dict[str, Any]] = {}
    for row in concepts:
        name = row["concept"]
        if name not in best or row[f"_{column}"] > best[name][f"_{column}"]:
            best[name] = row
    return sum(row[column] >= 0.5 for row in best.values())


def split(ids: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Numbers of the images on which is chosen, and of those by which is judged; an image's id decides."""
    chosen: list[int] = []
    judged: list[int] = []
    for number, name in enumerate(ids):
        digest = hashlib.sha256(b"chosen on\x1f" + name.encode("utf-8", "surrogatepass")).digest()
        (chosen if int.from_bytes(digest[:8], "big") < share * 2**64 else judged).append(number)
    return chosen, judged


def dictionary_rows(images: CodedImages, vectors: WordVectors) -> Iterator[dict[str, Any]]:
    """A row for each feature: in every image its map votes for the tag whose region it covers best."""
    votes = torch.zeros((images.num_features, len(images.tags)))
    ious = torch.zeros_like(votes)
    for number in range(len(images.ids)):
        one = images.of([number])
        active = torch.zeros((one.num_features, one.places))
        rows = torch.arange(one.places)[:, None].expand_as(one.features)
        active[one.features, rows] = (one.values > 0).float()
        there = active.any(dim=1).nonzero()[:, 0]
        found = torch.stack([iou_of(active[there], one.covered[:, tag]) for tag in range(len(one.tags))], dim=1)
        best, tag = found.max(dim=1)
        voting = best > 0
        votes[there[voting], tag[voting]] += 1
        ious[there[voting], tag[voting]] += best[voting]
    density, intensity = images.density(), images.intensity()
    embedded = torch.stack([torch.from_numpy(np.asarray(vectors(tag), dtype=np.float32)) for tag in images.tags])
    for feature in range(images.num_features):
        total = float(votes[feature].sum())
        order = [tag for tag in votes[feature].argsort(descending=True).tolist() if votes[feature, tag] > 0]
        top = intensity[:, feature].sort(descending=True, stable=True)
        yield {
            "feature": feature,
            "tags": [images.tags[tag] for tag in order],
            "weights": [float(votes[feature, tag]) / total for tag in order],
            "votes": int(total),
            "mean_iou": float(ious[feature].sum()) / total if total else None,
            "density": float(density[feature]),
            "embedding": (votes[feature] @ embedded / total).tolist() if total else [],
            "top_images": [
                images.ids[number]
                for value, number in zip(
                    top.values[:TOP_IMAGES].tolist(), top.indices[:TOP_IMAGES].tolist(), strict=True
                )
                if value > 0
            ],
        }


def concept_rows(chosen: CodedImages, judged: CodedImages, set_size: int) -> Iterator[dict[str, Any]]:
    """A row for each tag: the feature and the set that tell it best where they are chosen, judged on other images; and
    the set that tells its place best in images that show it."""
    ious, thresholds = single_ious(chosen)
    for tag, name in enumerate(chosen.tags):
        covered = judged.covered[:, tag]
        shown = covered.view(len(judged.ids), -1).any(dim=1)
        if not bool(chosen.covered[:, tag].any()):
            continue  # nothing to choose it by
        single = int(ious[:, tag].argmax())
        limit = float(thresholds[single, tag])
        single_iou = float(iou_of((judged.score([single], [1.0]) > limit).float(), covered))
        features, weights = chosen_set(chosen, tag, set_size)
        told = best_threshold(chosen.score(features, weights), chosen.covered[:, tag])
        set_iou = float(iou_of((judged.score(features, weights) > told.threshold).float(), covered))
        use_set = told.iou > float(ious[single, tag])
        yield {
            "concept": name,
            "features": features if use_set else [single],
            "weights": weights if use_set else [1.0],
            "threshold": told.threshold if use_set else limit,
            "iou": set_iou if use_set else single_iou,
            "amounts": amounts_of(chosen, tag, features if use_set else [single]),
            **place_of(chosen, judged, tag, set_size),
            "single_feature": single,
            "single_threshold": limit,
            "single_iou": single_iou,
            "set_iou": set_iou if use_set else single_iou,
            "images": int(shown.sum()),
            "_single_iou": float(ious[single, tag]),  # where it was chosen
            "_set_iou": max(told.iou, float(ious[single, tag])),
        }


def place_of(chosen: CodedImages, judged: CodedImages, tag: int, set_size: int) -> dict[str, Any]:
    """What tells where a tag is in images that show it, chosen and judged on such alone.

    Another question than whether it is there: the place of a green face is that of any face.
    """
    some, others = (images.of(images.showing(tag)) for images in (chosen, judged))
    features, weights = chosen_set(some, tag, set_size)
    score, covered = (one.view(len(some.ids), -1) for one in (some.score(features, weights), some.covered[:, tag]))
    told = best_place_threshold(score, covered)
    iou = told.iou
    if others.ids:
        found = (others.score(features, weights) > told.threshold).float().view(len(others.ids), -1)
        iou = float(mean_iou(found, others.covered[:, tag].view_as(found)))
    return {"place_features": features, "place_weights": weights, "place_threshold": told.threshold, "place_iou": iou}


def gallery_of(
    found: Collected,
    entries: dict[RecordingKey, BlockAutoencoder],
    concepts: Sequence[dict[str, Any]],
    count: int,
) -> list[GalleryEntry]:
    """Each concept by the autoencoder that tells it best, with the images that have most of it."""
    best: dict[str, dict[str, Any]] = {}
    for row in concepts:
        if row["concept"] not in best or row["iou"] > best[row["concept"]]["iou"]:
            best[row["concept"]] = row
    shown = []
    for name, row in sorted(best.items()):
        key = RecordingKey(row["block"], row["time"], row["branch"])
        images = found.of(key, entries[key].autoencoder.num_features)
        score = images.score(row["features"], row["weights"]).clamp_min(0).view(len(images.ids), -1).mean(dim=1)
        top = score.topk(min(count, len(images.ids)))
        shown.append(
            GalleryEntry(
                concept=name,
                block=key.block,
                time=key.time,
                features=tuple(row["features"]),
                iou=row["iou"],
                images=tuple(
                    (images.ids[number], value, found.thumbnails[number])
                    for value, number in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                    if value > 0
                ),
            )
        )
    return shown


def _thumbnail(pixels: np.ndarray) -> bytes:
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
