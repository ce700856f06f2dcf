"""run.json: what made a run. Written once, before any result; a rerun must agree with it.

It holds the resolved recipe (without storage options, which may hold secrets), the model, the input's listing and the
versions. What a rerun may change (workers, engine, budgets) is recorded, and not compared. The call size and the
threads of a CPU worker are decided by the first run and kept by every later one: both decide bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

import pipeline
from pipeline.errors import SinkError
from pipeline.models.backbone import ModelRecord
from pipeline.reading.storage import open_fs, retrying
from pipeline.recipe import Recipe, SinkConfig
from pipeline.sections import COLUMN_NAMES
from pipeline.showing import public_url
from pipeline.writing.files import get, put

if TYPE_CHECKING:
    from pipeline.reading.units import Shard

RUN_FILE = "run.json"
# Of all that stands in a run's folder. 2: results without a region have no mask; other figures. 3: names of files carry
# the generation of the driver that wrote them, or digits of their contents.
SCHEMA_VERSION: Literal[3] = 3
PACKAGES = ("torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "numpy", "webdataset")
SHOWN_DIFFERENCES = 12
_MISSING = "nothing"


class RunRecord(BaseModel):
    """See the module."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[3] = SCHEMA_VERSION
    recipe_hash: str
    settings: dict[str, Any]  # what decides results: `Recipe.result_settings`, credentials removed
    recipe: dict[str, Any]  # the whole resolved recipe
    model: dict[str, str]
    call_size: int  # rows of a UNet call
    threads: int  # of a CPU worker
    input_fingerprint: str
    input: list[tuple[str, int, str]]  # (shard path, bytes, etag), sorted
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """JSON, one shard per line: a listing may be long, and two of them should compare well."""
        data = self.model_dump(mode="json")
        shards = data.pop("input")
        head = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False)
        lines = ",\n  ".join(json.dumps(shard, ensure_ascii=False) for shard in shards)
        return (head.removesuffix("\n}") + f',\n "input": [\n  {lines}\n ]\n}}\n').encode("utf-8", "replace")


def run_record(recipe: Recipe, shards: Sequence[Shard], model: ModelRecord, call_size: int, threads: int) -> RunRecord:
    """Describe a run that is about to start."""
    listing = sorted((shard.path, shard.size, _version_of(shard)) for shard in shards)
    return RunRecord(
        recipe_hash=recipe.hash,
        settings=_public(recipe.result_settings()),
        recipe=_public(json.loads(recipe.canonical_json())),
        model=asdict(model),
        call_size=call_size,
        threads=threads,
        input_fingerprint=hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        input=listing,
        versions={
            "shardedit": pipeline.__version__,
            "python": platform.python_version(),
            **_versions(),
        },
    )


def _versions() -> dict[str, str]:
    """Of the packages that are installed: a run in one process needs no Ray."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _version_of(shard: Shard) -> str:
    """What changes when a shard's content does. A folder is one shard of many files."""
    if not shard.files:
        return shard.etag
    return hashlib.sha256(repr((shard.etag, shard.files)).encode("utf-8", "replace")).hexdigest()[:32]


def _public(recipe: dict[str, Any]) -> dict[str, Any]:
    """A dumped recipe without the credentials that an address may carry."""
    recipe["source"]["shards"] = [public_url(url) for url in recipe["source"]["shards"]]
    if "folder" in recipe["sink"]:
        recipe["sink"]["folder"] = public_url(recipe["sink"]["folder"])
    return recipe


def read_run_record(sink: SinkConfig) -> RunRecord | None:
    """The record of the run that the sink's folder belongs to; None for a new folder.

    Raises:
        SinkError: the folder holds results but no record, or a record of another kind.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    data = get(fs, f"{root}/{RUN_FILE}")
    where = public_url(sink.folder)
    if data is None:
        if stranger := _first_stranger(fs, root):
            if get(fs, f"{root}/{RUN_FILE}") is not None:  # another partition began in between
                return read_run_record(sink)
            raise SinkError(
                f"{where} holds {stranger}/ but no {RUN_FILE}: it is no run of ours. Set another sink.folder"
            )
        return None
    try:
        check_schema(json.loads(data), where)
        return RunRecord.model_validate_json(data)
    except ValueError as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise SinkError(f"{where}/{RUN_FILE} is no record of a run ({what}). Set another sink.folder") from error


def column_names_of(record: Any) -> dict[str, str]:
    """Names of columns that are not our own, of the run of a run.json."""
    return COLUMN_NAMES[record["recipe"]["sink"]["columns"]]


def check_schema(record: Any, where: str) -> None:
    """Refuse a folder that another version of this package wrote, whose files hold other things.

    Args:
        record: what run.json holds.
        where: the folder's address.

    Raises:
        SinkError: says which version wrote it, and the way out.
    """
    found = record.get("schema_version") if isinstance(record, dict) else None
    if isinstance(found, int) and found != SCHEMA_VERSION:
        version_of = record.get("versions")
        by = version_of.get("shardedit", "") if isinstance(version_of, dict) else ""
        raise SinkError(
            f"{where} was written by another version of shardedit{f' ({by})' if by else ''}: its schema is {found}, "
            f"this one's is {SCHEMA_VERSION}. Use that version for this folder, or set another sink.folder"
        )


def _first_stranger(fs: AbstractFileSystem, root: str) -> str | None:
    folders = ("data", "quarantine", "_parts", "_units")
    return next((folder for folder in folders if retrying()(fs.exists, f"{root}/{folder}")), None)


def write_run_record(record: RunRecord, sink: SinkConfig) -> None:
    """Write the record of a new run."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    put(fs, f"{root}/{RUN_FILE}", record.to_bytes())


def check_same_run(before: RunRecord, now: RunRecord, sink: SinkConfig) -> None:
    """Refuse to go on where what decides results has changed.

    Raises:
        SinkError: lists the differences, and the way out.
    """
    differences = [
        *_differences("", before.settings, now.settings),
        *_differences("model (loaded).", before.model, now.model),
        *_input_differences(before, now),
    ]
    if not differences:
        return
    shown = differences[:SHOWN_DIFFERENCES]
    if len(differences) > len(shown):
        shown.append(f"... and {len(differences) - len(shown)} more")
    raise SinkError(
        f"{public_url(sink.folder)} belongs to a run that differs from this one:\n"
        + "\n".join(f"  {line}" for line in shown)
        + "\nSet another sink.folder for a new run, or undo the change to go on with the old one"
    )


def _differences(prefix: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        inner = [
            _differences(f"{prefix}{key}.", before.get(key, _MISSING), now.get(key, _MISSING))
            for key in sorted({*before, *now})
        ]
        return [line for lines in inner for line in lines]
    if before == now:
        return []
    return [f"{prefix.removesuffix('.')}: was {_shown(before)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    text = value if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _input_differences(before: RunRecord, now: RunRecord) -> list[str]:
    if before.input_fingerprint == now.input_fingerprint:
        return []
    old = {path: rest for path, *rest in before.input}
    new = {path: rest for path, *rest in now.input}
    lines = [f"input: {path} is gone" for path in sorted(old.keys() - new.keys())]
    lines += [f"input: {path} is new" for path in sorted(new.keys() - old.keys())]
    for path in sorted(old.keys() & new.keys()):
        if old[path] != new[path]:
            sizes = f"was {old[path][0]} bytes, is {new[path][0]}"
            lines.append(f"input: {path} has changed ({sizes})")
    return lines


def versions_that_differ(before: RunRecord, now: RunRecord) -> list[str]:
    """Packages that another version of might give other bits: no reason to stop, but worth a line."""
    return _differences("", before.versions, now.versions)
