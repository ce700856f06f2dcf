"""README.md: the dataset card, by which `datasets.load_dataset(FOLDER)` and dataset hubs know what is what.

Its head names the files of each configuration that count ("default": the results, in a split of their own those that
gates rejected; "quarantine": what failed), their features and how many rows they have; its text says how they were
made. A README.md of somebody else's is never touched: ours then stands beside it as README.shardedit.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fsspec import AbstractFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.records import EditRequest
from pipeline.writing.commit import committed_units
from pipeline.writing.files import get, put, read_part
from pipeline.writing.instructions import instruction_of
from pipeline.writing.manifest import KINDS, SUFFIXES
from pipeline.writing.merged import Merged
from pipeline.writing.merging import unified
from pipeline.writing.run_record import RunRecord
from pipeline.writing.summary import Summary

CARD = "README.md"
BESIDE = "README.shardedit.md"  # where a card of the user's is in the way
NAMED = 1000  # files at most; a name takes about 50 bytes
MARK = "<!-- Written by shardedit, anew at the end of every run. Remove this line to keep your changes. -->"
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
# Name of the configuration that a kind of files belongs to, and of its split. What gates rejected has the columns of
# what they let pass, and stands beside it.
PLACES = {"data": ("default", "train"), "rejected": ("default", "rejected"), "quarantine": ("quarantine", "train")}


def write_card(sink: SinkConfig, record: RunRecord, summary: Summary) -> str:
    """Write the card of a run that is done; returns its name in the folder.

    Raises:
        SinkError: the folder cannot be read or written.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    before = get(fs, f"{root}/{CARD}")
    name = CARD if before is None or MARK.encode() in before else BESIDE
    merged = Merged(fs, root)
    kinds, files = _kinds(fs, root, sink, summary, merged), _files(sink, merged)
    put(fs, f"{root}/{name}", card(sink, record, summary, kinds, files).encode("utf-8", "replace"))
    return name


def card(
    sink: SinkConfig,
    record: RunRecord,
    summary: Summary,
    kinds: Mapping[str, dict[str, Any]],
    files: Mapping[str, Sequence[str]],
) -> str:
    """The text of the card.

    Args:
        sink: where the run stands.
        record: its run.json.
        summary: its numbers.
        kinds: as far as there are rows, by kind of file: `dataset_info` of their configuration, with their split alone.
        files: of each kind, relative to the run's folder.
    """
    configs: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        (name, split), paths = PLACES[kind], _paths(kind, sink, files.get(kind, ()))
        configs.setdefault(name, []).append({"split": split, "path": paths})
    head: dict[str, Any] = {
        "configs": [{"config_name": name, "data_files": some} for name, some in configs.items()],
        "dataset_info": _infos(kinds),
        "task_categories": ["image-to-image"],
        "tags": ["image-editing", "synthetic", "shardedit"],
        "size_categories": [next((name for most, name in SIZES if summary.done < most), "n>10M")],
    }
    if not kinds:
        del head["configs"], head["dataset_info"]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{front}---\n{MARK}\n\n" + "\n\n".join(_text(sink, record, summary)) + "\n"


def _infos(kinds: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """`dataset_info` by configuration: splits of one are listed together, and their bytes added up."""
    infos: dict[str, dict[str, Any]] = {}
    for kind, info in kinds.items():
        name = PLACES[kind][0]
        before = infos.setdefault(
            name, {"config_name": name, **info, "splits": [], "download_size": 0, "dataset_size": 0}
        )
        before["splits"] = [*before["splits"], *info["splits"]]
        before["download_size"] += info["download_size"]
        before["dataset_size"] += info["dataset_size"]
    return list(infos.values())


def _paths(kind: str, sink: SinkConfig, files: Sequence[str]) -> str | list[str]:
    # By name, since files of a driver that was taken over may stand beside them; by pattern where the list would be too
    # long for a card.
    if len(files) <= NAMED:
        return list(files)
    return f"{kind}/{'train' if sink.shard_size else 'part'}-*.{SUFFIXES[sink.format]}"


def _text(sink: SinkConfig, record: RunRecord, summary: Summary) -> list[str]:
    recipe = record.recipe
    reasons = ", ".join(f"{name} {count}" for name, count in summary.failed_by_class.items())
    failed = f"; {summary.failed:,} failed ({reasons}) and are kept, with their reasons, in `quarantine/`"
    opened = 'load_dataset("FOLDER")'
    if summary.rejected_rows:
        opened = 'load_dataset("FOLDER", split="train")  # the results\nload_dataset("FOLDER", split="rejected")'
        opened += "  # what gates rejected"
    if summary.failed:
        opened += "" if summary.rejected_rows else "  # the results"
        opened += '\nload_dataset("FOLDER", "quarantine")  # what failed'
    return [
        "# Local latent bases" if recipe.get("job") == "basis" else "# Edited images",
        f"{summary.done:,} results from {summary.images:,} images{_about_gates(summary)}"
        f"{failed if summary.failed else ''}. "
        f"Made by shardedit {record.versions.get('shardedit', '')}.",
        f"```python\nfrom datasets import load_dataset\n\n{opened}\n```",
        "## How it was made",
        "\n".join(
            [
                "| | |",
                "|---|---|",
                f"| model | {cell(' '.join(record.model.get(key, '') for key in ('name', 'revision')))} |",
                f"| weights | {cell(' '.join(record.model.get(key, '') for key in ('digest', 'dtype')))} |",
                *(f"| method `{name}` | {cell(method)} |" for name, method in _methods(recipe).items()),
                f"| seed | {recipe['run']['seed']} |",
                f"| recipe | `{record.recipe_hash}`; the whole of it stands in `run.json` |",
                f"| source | {cell(', '.join(recipe['source']['shards']))} |",
            ]
        ),
        "## The edits",
        _edits(recipe),
        "Every row says what was asked, by which method and seed, what its mask covers and how well the rest was kept.",
    ]


def _about_gates(summary: Summary) -> str:
    if not summary.rejected_rows:
        return ""
    by_gate = ", ".join(f"{name} {gate.rejected}" for name, gate in summary.gates.items() if gate.rejected)
    return f"; {summary.rejected_rows:,} were rejected by gates ({by_gate}) and are kept, with reasons, in `rejected/`"


def _methods(recipe: Mapping[str, Any]) -> dict[str, str]:
    methods = recipe["methods"] or {recipe["editing"]["method"]: recipe}
    return {name: f"{one['editing']['method']} after {one['inversion']['method']}" for name, one in methods.items()}


def _edits(recipe: Mapping[str, Any]) -> str:
    """What is asked of images that bring no edit of their own."""
    if not recipe["edits"]:
        return "Each image brought its own."
    asked = {name: instruction_of(EditRequest.model_validate(edit)) for name, edit in recipe["edits"].items()}
    lines = [f"- `{name}`: {cell(text) or 'see `request`'}" for name, text in asked.items()]
    return "\n".join([*lines, "", "Images may have brought edits of their own instead."])


def cell(text: str) -> str:
    """Untrusted text in one line of Markdown, shown as text whatever it holds."""
    kept = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>|#!" else sign for sign in kept)


def _files(sink: SinkConfig, merged: Merged) -> dict[str, list[str]]:
    """Paths of the files that count, by kind; where there are more than `NAMED`, some of them."""
    if sink.shard_size:
        return {kind: [slot.file.path for slot in merged.slots(kind) if slot.file] for kind in KINDS}
    files: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for manifest in committed_units(sink):
        for kind, file in manifest.by_kind.items():
            files[kind].append(file.path)
        if max(map(len, files.values())) > NAMED:
            break
    return files


def _kinds(
    fs: AbstractFileSystem, root: str, sink: SinkConfig, summary: Summary, merged: Merged
) -> dict[str, dict[str, Any]]:
    """`dataset_info` of what there is, by kind."""
    found = {}
    for kind, rows in zip(KINDS, (summary.done, summary.rejected_rows, summary.failed), strict=True):
        if not rows:
            continue
        files = [slot.file for slot in merged.slots(kind) if slot.file is not None]
        size = sum(file.size for file in files)
        info: dict[str, Any] = {}
        if files and files[0].path.endswith(".parquet"):  # of a tar `datasets` finds out by itself
            info["features"] = features_in_yaml(
                unified([read_part(fs, f"{root}/{file.path}", pq.read_schema) for file in files])
            )
        info["splits"] = [{"name": PLACES[kind][1], "num_bytes": size, "num_examples": rows}]
        found[kind] = info | {"download_size": size, "dataset_size": size}
    return found


def features_in_yaml(schema: pa.Schema) -> list[dict[str, Any]]:
    """The features of a schema of ours, as a dataset card spells them."""
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    return [{"name": name, **_feature(features[name])} for name in schema.names]


def _feature(feature: Any) -> dict[str, Any]:
    if isinstance(feature, list):
        (item,) = feature
        inner = _feature(item)
        return {"list": inner["dtype"] if isinstance(inner.get("dtype"), str) else inner["struct"]}
    match feature.get("_type"):
        case "Image":
            return {"dtype": "image"}
        case "ClassLabel":
            return {"dtype": {"class_label": {"names": {str(at): name for at, name in enumerate(feature["names"])}}}}
        case "Value":
            return {"dtype": feature["dtype"]}
    return {"struct": [{"name": name, **_feature(inner)} for name, inner in feature.items()]}
