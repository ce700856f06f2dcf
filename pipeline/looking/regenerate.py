"""Make one result again from its own provenance, and compare: are these the bytes that this recipe and seed give?"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.answering import servers_of
from pipeline.best_of import again
from pipeline.common.showing import public_url
from pipeline.engine.engine import Engine
from pipeline.errors import SinkError, SourceError
from pipeline.evaluation.looks import gates_of
from pipeline.evaluation.metrics import psnr
from pipeline.flow import edit_rows
from pipeline.looking.runs import Run
from pipeline.models.loading import load_backbone
from pipeline.reading.decode import in_bands
from pipeline.reading.decoder import Decoder
from pipeline.reading.requests import asked_of
from pipeline.reading.shards import Shard
from pipeline.reading.storage import FileSystem, open_fs
from pipeline.reading.units import list_shards, plan_reads, read_units
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Asked, Decoded, Rejected
from pipeline.samples import ReadRow, Unreadable
from pipeline.writing.commit import committed_units
from pipeline.writing.finish import labels_of
from pipeline.writing.manifest import Manifest
from pipeline.writing.merged import Merged, Span
from pipeline.writing.parquet import render_parquet
from pipeline.writing.restoring import outcome_of
from pipeline.writing.rows import (
    ATTEMPT,
    ATTEMPTS_FAILED,
    CHOSEN,
    Labels,
    OutputRow,
    as_written,
    encode_outcome,
    schema_of,
)
from pipeline.writing.run_record import RunRecord, run_record, versions_that_differ
from pipeline.writing.spans import samples_of, table_of, tar_samples
from pipeline.writing.webdataset import render_tar

SHOWN = 8  # results that an error lists where a key names several


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A stored result beside the one made now."""

    id: str
    edit: str
    method: str
    file: str  # where it is stored
    row: int  # in that file, from 0
    did: tuple[str, ...]  # what was read, edited and compared, in words
    differences: tuple[str, ...]  # none: equal in every byte
    changed: tuple[str, ...]  # what has changed since it was made: source, model, versions

    @property
    def equal(self) -> bool:
        """Whether every column or member has the same bytes."""
        return not self.differences


@dataclass(frozen=True, slots=True)
class _StoredRow:
    manifest: Manifest
    span: Span
    row: int  # of the span, from 0
    about: dict[str, Any]  # id, key, index, edit, method
    parts: dict[str, Any]  # columns of a Parquet row, or members of a tar

    @property
    def file(self) -> str:
        return self.span.path


def regenerate(
    run: Run, key: str, *, edit: str | None = None, method: str | None = None, attempt: int | None = None
) -> Comparison:
    """Make one result of a run again.

    Args:
        run: where it stands.
        key: the row's id, or its key where that is unique in the run.
        edit: which of the row's edits, where there are several.
        method: which of the recipe's methods, where there are several.
        attempt: which of several attempts; None: the one that was chosen, where one was.

    Raises:
        SinkError: no result of that name is there, or several; says which.
        SourceError: the input cannot be read any more.
        ModelError: the model cannot be loaded any more.
    """
    stored = _find(run, key, edit, method, attempt)
    recipe = _recipe_of(run)
    shard, row = _read_again(stored, recipe)
    record = run.record
    on_cpu = record.model["device"] == "cpu"
    about = stored.about
    with _threads(record.threads if on_cpu else None):
        backbone = load_backbone(recipe.model, device="cpu" if on_cpu else None)
        backbone.tune(record.tuned.tuning)
        engine = Engine(backbone, call_size=record.call_size, asker=servers_of(recipe, asks=False))
        gates = gates_of(recipe)
        made = [
            encode_outcome(outcome_of(result, gates), recipe, backbone.record, record.call_size)
            for result in edit_rows([_asked(row, recipe, about)], recipe, engine, Decoder(recipe.source))
            if _name_of(result) == (about["edit"], about["method"])
        ]
    if recipe.best_of is not None:  # what the other attempts decide is taken from the row
        decided = {name: about[name] for name in (CHOSEN, ATTEMPTS_FAILED)}
        made = [one if isinstance(one, Rejected) else one | decided for one in made]
    sample = row.sample if isinstance(row, Unreadable) else row
    differences, compared = (
        _compared(stored, made[0], recipe, labels_of([row]))
        if made
        else (["the row is not asked for this any more"], "nothing")
    )
    seed = f"seed {made[0]['seed']}" if made and not isinstance(made[0], Rejected) else "no result"
    threads = f", {record.threads} thread(s)" if on_cpu else ""
    now = run_record(recipe, [], backbone.record, record.call_size, record.threads, record.tuned)
    return Comparison(
        id=about["id"],
        edit=about["edit"],
        method=about["method"],
        file=stored.file,
        row=stored.span.start + stored.row,
        did=(
            f"read: row {sample.index} of {public_url(shard.url)}, {len(sample.image):,} bytes of image",
            f"edited: {about['edit']} by {about['method']}, {seed}, call size {record.call_size}, "
            f"on {backbone.record.device}{threads}",
            f"compared: {compared}",
        ),
        differences=tuple(differences),
        changed=(*_source_changes(stored.manifest, shard), *_changes(record, now)),
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads; afterwards with as many as before: the process is the caller's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name_of(result: Decoded | Rejected) -> tuple[str, str]:
    return result.edit, result.method


def _asked(row: ReadRow, recipe: Recipe, about: Mapping[str, Any]) -> Asked:
    asked = asked_of(row, recipe)
    if not about.get(ATTEMPT):
        return asked
    return again(asked, recipe, about[ATTEMPT], frozenset({(about["edit"], about["method"])}))


def _find(run: Run, key: str, edit: str | None, method: str | None, attempt: int | None) -> _StoredRow:
    fs, root = open_fs(run.sink.folder, run.sink.storage_options)
    # An id begins with its shard's path; a bare key is looked for everywhere.
    shards = {path for path, _, _ in run.record.input if key.startswith(f"{path}/")}
    found: list[_StoredRow] = []
    failed = ""
    merged = Merged(fs, root)
    for manifest in committed_units(run.sink):
        if shards and manifest.shard not in shards:
            continue
        for span in merged.spans(manifest):
            for at, about, parts in _rows_of(fs, root, span, key):
                if edit not in (None, about["edit"]) or method not in (None, about["method"]):
                    continue
                if span.kind == "quarantine":
                    failed = f"; it failed in stage {about['stage']}: {about['error_class']}: {about['message']}"
                else:
                    found.append(_StoredRow(manifest, span, at, about, parts))
    where = public_url(run.sink.folder)
    if attempt is not None:
        found = [one for one in found if one.about.get(ATTEMPT, 0) == attempt]
    elif any(one.about.get(CHOSEN) for one in found):
        found = [one for one in found if one.about.get(CHOSEN)]
    if not found:
        raise SinkError(f"{where} has no result '{key}'{failed}")
    if len(found) > 1:
        names = [
            f"  {one.about['id']} --edit {one.about['edit']} --method {one.about['method']}"
            + (f" --attempt {one.about[ATTEMPT]}" if ATTEMPT in one.about else "")
            for one in found
        ]
        more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        raise SinkError("\n".join([f"{where} has several results '{key}'. Choose one:", *names[:SHOWN], *more]))
    return found[0]


def _rows_of(fs: FileSystem, root: str, span: Span, key: str) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Rows of a unit with that id or key: their place in it, their names, and what is stored of them."""
    if span.path.endswith(".tar"):
        for at, sample in enumerate(samples_of(fs, root, span)):
            about = json.loads(sample["json"])
            if key in (about["id"], about["key"]):
                yield at, about, sample
        return
    for at, name in enumerate(table_of(fs, root, span, ["id", "key"]).to_pylist()):
        if key in (name["id"], name["key"]):
            (row,) = table_of(fs, root, replace(span, start=span.start + at, rows=1)).to_pylist()
            yield at, row, row


def _recipe_of(run: Run) -> Recipe:
    """The recipe that run.json holds, with what opens the source."""
    data = json.loads(json.dumps(run.record.recipe))
    if data["methods"]:  # resolved, it holds the default pair as well, which a recipe with methods may not name
        del data["inversion"], data["editing"]
    data["source"]["storage_options"] = dict(run.source_options)
    return recipe_from(data, "run.json")


def _read_again(stored: _StoredRow, recipe: Recipe) -> tuple[Shard, ReadRow]:
    manifest = stored.manifest
    shards = [shard for shard in list_shards(recipe.source) if shard.path == manifest.shard]

    def is_other(unit: str) -> bool:
        return unit != manifest.unit

    for task in plan_reads(shards, recipe.run.unit_size, is_other, lambda _: False):
        for unit_input in read_units(task, recipe.source, recipe.run.unit_size, is_other):
            for row in unit_input.rows:
                sample = row.sample if isinstance(row, Unreadable) else row
                if sample.index == stored.about["index"] and sample.id == stored.about["id"]:
                    return shards[0], row
    raise SourceError(f"{stored.about['id']} is no longer in the source: {', '.join(_public(recipe))}")


def _public(recipe: Recipe) -> list[str]:
    return [public_url(url) for url in recipe.source.shards]


def _source_changes(manifest: Manifest, shard: Shard) -> Iterator[str]:
    if (manifest.shard_size, manifest.shard_etag) != (shard.size, shard.etag):
        sizes = f"was {manifest.shard_size} bytes, is {shard.size}"
        yield f"source: {manifest.shard} is another version than was edited ({sizes})"


def _changes(before: RunRecord, now: RunRecord) -> Iterator[str]:
    for name, value in before.model.items():
        if now.model.get(name) != value:
            yield f"model: {name} was {value}, is {now.model.get(name)}"
    if before.recipe_hash != now.recipe_hash:
        yield f"recipe: was {before.recipe_hash}, this version of shardedit makes {now.recipe_hash} of it"
    yield from (f"version of {line}" for line in versions_that_differ(before, now))


def _compared(stored: _StoredRow, made: OutputRow | Rejected, recipe: Recipe, labels: Labels) -> tuple[list[str], str]:
    """What differs, and what was compared, in words."""
    if isinstance(made, Rejected):
        return [f"it fails now, in stage {made.stage}: {made.error_class}: {made.message}"], "nothing"
    if stored.file.endswith(".tar"):
        (parts,) = tar_samples(io.BytesIO(render_tar([made], recipe.sink)))
        now: Mapping[str, Any] = parts
    else:
        # Through a file and back, so that both have gone the same way.
        data = render_parquet([as_written(made, recipe.sink, labels)], schema_of(recipe, labels))
        now = pq.read_table(pa.BufferReader(data)).to_pylist()[0]
    names = [*stored.parts, *(name for name in now if name not in stored.parts)]
    pairs = {name: (stored.parts.get(name), now.get(name)) for name in names}
    differences = [_difference(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]
    what = "members" if stored.file.endswith(".tar") else "columns"
    equal = len(names) - len(differences)
    return differences, ", ".join([f"{equal} of {len(names)} {what} equal", *_pixels_equal(pairs)])


def _pixels_equal(pairs: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """Of every picture, how many of its pixels are the same."""
    for name, pair in pairs.items():
        one, other = map(_picture, pair)
        if one is not None and other is not None and one.shape == other.shape:
            same = (one == other).all(axis=2)
            yield f"{name} {int(same.sum()):,} of {same.size:,} pixels"


def _difference(name: str, before: Any, now: Any) -> str:
    one, other = _picture(before), _picture(now)
    if one is None or other is None:
        return f"{name}: was {_short(before)}, is {_short(now)}"
    if one.shape != other.shape:
        return f"{name}: was {one.shape[1]} x {one.shape[0]} pixels, is {other.shape[1]} x {other.shape[0]}"
    share = float((one != other).any(axis=2).mean())
    if share == 0:
        return f"{name}: the same pixels, encoded otherwise"
    return f"{name}: PSNR {psnr(one, other):.1f} dB, {share:.2%} of the pixels differ"


def _picture(value: Any) -> np.ndarray | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return in_bands(image, lambda band: band.convert("RGB"))
    except OSError:
        return None


def _short(value: Any) -> str:
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
