"""run.json: what made a run. Written once, before any result; a rerun must agree with it.

It holds the resolved recipe (without storage options, which may hold secrets), the model, the input's listing and the
versions. What a rerun may change (workers, engine, budgets) is recorded, and not compared. The call size, the threads
of a CPU worker and how the network runs are decided by the first run and kept by every later one: all decide bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, Field, field_validator

import pipeline
from pipeline.common.showing import public_url
from pipeline.engine.backbone import ModelRecord
from pipeline.engine.tuning import NOT_TUNED, Tuned
from pipeline.errors import SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe, SinkConfig, hash_of
from pipeline.settings.sections import COLUMN_NAMES
from pipeline.writing.files import NotAFileError, from_json, get, list_folder, put
from pipeline.writing.paths import first_problem

if TYPE_CHECKING:
    from pipeline.reading.units import Shard

RUN_FILE = "run.json"
# Of all files in a run's folder. 2: results without a region have no mask; other figures. 3: names of files carry
# the generation of the driver that wrote them, or digits of their contents. 4: a manifest counts `network_rows`. 5: a
# record says how the network runs.
SCHEMA_VERSION: Literal[5] = 5
# What a run writes below its folder after the record; README.md has a mark of its own (writing/card.py).
OURS = (
    *("data", "rejected", "quarantine", "_parts", "_units", "_shards", "_output", "_attempts", "_judged", "_answers"),
    *("summary.json", "report.html", "report"),
)
PACKAGES = ("torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "numpy", "webdataset")
SHOWN_DIFFERENCES = 12
_MISSING = "nothing"


class _Named(BaseModel):
    method: str


class _StoredMethod(BaseModel):
    inversion: _Named
    editing: _Named


class _StoredSource(BaseModel):
    shards: list[str]


class _StoredSink(BaseModel):
    columns: Literal[*COLUMN_NAMES]  # type: ignore[valid-type]
    format: Literal["parquet", "webdataset"]
    shard_size: Annotated[int, Field(ge=0)]


class _StoredRun(BaseModel):
    seed: int
    unit_size: Annotated[int, Field(ge=1)]
    max_failed_fraction: float


class _StoredRecipe(_StoredMethod):
    """Those parts of a recipe that readers of run.json rely on."""

    source: _StoredSource
    edits: dict[str, dict[str, Any]]
    methods: dict[str, _StoredMethod]
    sink: _StoredSink
    run: _StoredRun


class RunRecord(BaseModel):
    """run.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[5] = SCHEMA_VERSION
    recipe_hash: str
    settings: dict[str, Any]  # what decides results: `Recipe.result_settings`, credentials removed
    recipe: dict[str, Any]  # the whole resolved recipe
    model: dict[str, str]
    call_size: int = Field(ge=1)  # rows of a network call
    threads: int = Field(ge=1)  # of a CPU worker
    tuned: Tuned  # how the network runs, and how fast it was in every way that was tried
    sha256: str = ""  # of all else that is recorded
    input_fingerprint: str
    input: list[tuple[str, int, str]]  # (shard path, bytes, etag), sorted
    versions: dict[str, str]

    @field_validator("recipe")
    @classmethod
    def _has_what_readers_need(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        _StoredRecipe.model_validate(recipe)
        return recipe

    @field_validator("model")
    @classmethod
    def _describes_a_model(cls, model: dict[str, str]) -> dict[str, str]:
        if model.keys() != {field.name for field in fields(ModelRecord)}:
            raise ValueError(f"it has {', '.join(model)}")
        return model

    @property
    def digest(self) -> str:
        """What `sha256` should be."""
        data = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def problems(self) -> list[str]:
        """What was changed since it was written, as far as the record alone tells."""
        found = []
        if self.sha256 != self.digest:
            found.append("was changed since it was written: its own SHA-256 is another")
        if self.recipe_hash != hash_of(self.settings):
            found.append(f"its recipe_hash {self.recipe_hash} is not that of its settings, {hash_of(self.settings)}")
        if self.input_fingerprint != _fingerprint(self.input):
            found.append("its input_fingerprint is not that of its input")
        return found + [
            f"its recipe contradicts its settings: {line}" for line in _misfits("", self.settings, self.recipe)
        ]

    def to_bytes(self) -> bytes:
        """JSON, one shard per line: a listing may be long, and two of them should compare well."""
        data = self.model_dump(mode="json")
        shards = data.pop("input")
        head = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False)
        lines = ",\n  ".join(json.dumps(shard, ensure_ascii=False) for shard in shards)
        return (head.removesuffix("\n}") + f',\n "input": [\n  {lines}\n ]\n}}\n').encode("utf-8", "replace")


def run_record(
    recipe: Recipe,
    shards: Sequence[Shard],
    model: ModelRecord,
    call_size: int,
    threads: int,
    tuned: Tuned = NOT_TUNED,
) -> RunRecord:
    """Describe a run that is about to start."""
    listing = run_input(shards)
    record = RunRecord(
        recipe_hash=recipe.hash,
        settings=recipe.result_settings(),
        recipe=_public(json.loads(recipe.canonical_json())),
        model=asdict(model),
        call_size=call_size,
        threads=threads,
        tuned=tuned,
        input_fingerprint=_fingerprint(listing),
        input=listing,
        versions={
            "shardedit": pipeline.__version__,
            "python": platform.python_version(),
            **_versions(),
        },
    )
    return record.model_copy(update={"sha256": record.digest})


def run_input(shards: Iterable[Shard]) -> list[tuple[str, int, str]]:
    """What a run records of its input: (path, bytes, etag) of every shard, sorted."""
    return sorted((shard.path, shard.size, shard.etag) for shard in shards)


def _fingerprint(listing: Sequence[tuple[str, int, str]]) -> str:
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Of the packages that are installed: a run in one process needs no Ray."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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
    where = public_url(sink.folder)
    try:
        data = get(fs, f"{root}/{RUN_FILE}")
    except NotAFileError:
        data = b""
    if data is None:
        if stranger := _first_stranger(fs, root):
            if get(fs, f"{root}/{RUN_FILE}") is not None:  # another partition began in between
                return read_run_record(sink)
            raise SinkError(
                f"{where} holds {stranger} but no {RUN_FILE}: it is lost, and with it what made the results, or this "
                "is no run of ours. Nothing is written over: restore the file from a copy, or set another sink.folder"
            )
        return None
    try:
        check_schema(from_json(data), where)
        return RunRecord.model_validate_json(data)
    except ValueError as error:
        what = first_problem(error)
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
    there = {posixpath.basename(path.rstrip("/")) for path in list_folder(fs, root)}
    return next((name for name in OURS if name in there), None)


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
        *(f"input: {path} {text}" for path, text in input_differences(before.input, now.input)),
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


def _misfits(prefix: str, part: Any, whole: Any) -> list[str]:
    """Where `whole` lacks what `part` has."""
    if isinstance(part, dict) and isinstance(whole, dict):
        inner = [_misfits(f"{prefix}{key}.", part[key], whole.get(key, _MISSING)) for key in part]
        return [line for lines in inner for line in lines]
    return [] if part == whole else [f"{prefix.removesuffix('.')} is {_shown(whole)}, was {_shown(part)}"]


def _shown(value: Any) -> str:
    text = value if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."


def input_differences(
    before: Iterable[tuple[str, int, str]], now: Iterable[tuple[str, int, str]]
) -> list[tuple[str, str]]:
    """What has changed in a run's input since: (path, how)."""
    old = {path: (size, etag) for path, size, etag in before}
    new = {path: (size, etag) for path, size, etag in now}
    found = [(path, "is gone") for path in sorted(old.keys() - new.keys())]
    found += [(path, "is new") for path in sorted(new.keys() - old.keys())]
    for path in sorted(old.keys() & new.keys()):
        (size, etag), (size_now, etag_now) = old[path], new[path]
        if size != size_now:
            found.append((path, f"has changed (was {size} bytes, is {size_now})"))
        elif etag != etag_now:
            otherwise = etag.startswith("sha256 ") != etag_now.startswith("sha256 ")
            text = (
                "was looked at otherwise (set source.check as before)"
                if otherwise
                else "has changed (of the same size)"
            )
            found.append((path, f"{text}: its version was {etag}, is {etag_now}"))
    return found


def versions_that_differ(before: RunRecord, now: RunRecord) -> list[str]:
    """Packages whose version has changed and may change bits: no reason to stop, but worth a line."""
    return _differences("", before.versions, now.versions)
