"""A committed unit makes room for a better one: `--retry-failed`. And a damaged one is taken back: `verify --repair`.

A replacement's files have names of their own (by content), so that the old commit stays whole until the new manifest,
put in one piece, takes its place. What is then too many stands in a note written beforehand, by which the next start
removes it: a kill leaves the old commit or the new one.

    _replacing/UNIT.json        the files of both commits
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable

from fsspec import AbstractFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.commit import FinishedUnit, commit, manifest_of, units_of_shard
from pipeline.writing.files import get, list_folder, put, remove
from pipeline.writing.folding import folded_bytes
from pipeline.writing.manifest import KINDS, FileRecord, Manifest, manifest_path, shard_path, split_unit_id
from pipeline.writing.merged import INDEX, Index, Merged

NOTES = "_replacing"


def replace(finished: FinishedUnit, sink: SinkConfig, check: Callable[[], None]) -> Manifest:
    """Commit a unit in place of its earlier commit, if there is one. Doing it again leaves the same files.

    Args:
        finished: the unit.
        sink: where it stands.
        check: raises where another driver has taken the folder over. That one removes, as it starts, what no manifest
            lists yet: a manifest of ours put after that would list files that are gone.

    Returns:
        The manifest that now counts. Where nothing came out differently, the earlier one.

    Raises:
        SinkError: the sink does not take the files; the earlier commit then still stands.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    unit = finished.manifest.unit
    before = manifest_of(fs, root, unit)
    if before is None:
        return commit(finished, sink)
    there = {file.sha256: file for file in before.files}
    contents = dict(finished.files)
    files: list[FileRecord] = []
    written: list[tuple[str, bytes]] = []
    for file in finished.manifest.files:
        if kept := there.get(file.sha256):
            files.append(kept)
            continue
        stem, suffix = posixpath.splitext(file.path)
        renamed = file.model_copy(update={"path": f"{stem}-{file.sha256[:8]}{suffix}"})
        files.append(renamed)
        written.append((renamed.path, contents[file.path]))
    if files == list(before.files):
        return before
    note = f"{root}/{NOTES}/{unit}.json"
    put(fs, note, json.dumps(sorted({file.path for file in (*before.files, *files)})).encode())
    manifest = finished.manifest.model_copy(update={"files": tuple(files)})
    for path, data in written:
        put(fs, f"{root}/{path}", data)
    check()
    put(fs, f"{root}/{manifest_path(unit)}", manifest.to_bytes())
    _settle(fs, root, note)
    return manifest


def settle_replacements(sink: SinkConfig) -> None:
    """Finish what a kill interrupted: of a unit's old and new files, those stay that its manifest lists.

    Only for the one driver of a run, before its workers start.

    Raises:
        SinkError: the folder cannot be read, or files cannot be removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    for note in list_folder(fs, f"{root}/{NOTES}"):
        if note.endswith(".json"):
            _settle(fs, root, note)


def take_back(manifest: Manifest, sink: SinkConfig) -> None:
    """Undo a commit, its manifest first: the next run makes the unit again.

    Raises:
        SinkError: something cannot be removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    remove(fs, f"{root}/{manifest_path(manifest.unit)}")
    slug, _ = split_unit_id(manifest.unit)
    folded = f"{root}/{shard_path(slug)}"
    if fs.exists(folded):
        others = [one for one in units_of_shard(fs, root, slug, None) if one.unit != manifest.unit]
        put(fs, folded, folded_bytes(others))
    for file in manifest.files:
        remove(fs, f"{root}/{file.path}")


def take_back_merged(contents: Iterable[str], sink: SinkConfig) -> None:
    """Undo the writing of merged files, first in the index: the next run makes their units again.

    Args:
        contents: paths of the files' contents, as the index names them.
        sink: where the run stands.

    Raises:
        SinkError: something cannot be removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    merged = Merged(fs, root, trusted=False)
    bad = set(contents)
    slots = {kind: merged.slots(kind) for kind in KINDS}
    index = Index(
        slots={
            kind: tuple(slot.model_copy(update={"file": None}) if slot.contents in bad else slot for slot in some)
            for kind, some in slots.items()
        }
    )
    put(fs, f"{root}/{INDEX}", index.to_bytes())
    for slot in (slot for some in slots.values() for slot in some if slot.contents in bad):
        if slot.file is not None:
            remove(fs, f"{root}/{slot.file.path}")
        remove(fs, f"{root}/{slot.contents}")


def _settle(fs: AbstractFileSystem, root: str, note: str) -> None:
    data = get(fs, note)
    if data is None:  # another worker that committed the same unit was faster
        return
    manifest = manifest_of(fs, root, posixpath.basename(note).removesuffix(".json"))
    listed = {file.path for file in manifest.files} if manifest else set()
    for path in json.loads(data):
        if path not in listed:
            remove(fs, f"{root}/{path}")
    remove(fs, note)
