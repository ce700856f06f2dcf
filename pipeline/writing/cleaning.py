"""Removes what earlier drivers left, when the driver of a run or of a partition begins and ends.

writing/baseline.py says what may go, and in which order.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.attempts import Note, forget_stops, note_path, notes_there, take_over
from pipeline.writing.baseline import Baseline, Baselines, Counted, baseline_path
from pipeline.writing.commit import Committed
from pipeline.writing.files import is_temporary, list_folder, put, remove
from pipeline.writing.lock import Claim
from pipeline.writing.manifest import KINDS, PART_NAME, split_unit_id

# Longer than any put: a younger temporary file may be one that a worker is about to rename. The process id in its name
# proves nothing, since that worker may be on another machine, of a driver that has died.
OLD_S = 24 * 3600.0


def begin(
    sink: SinkConfig, claim: Claim, counted: Counted, committed: Committed, only: Iterable[str] | None = None
) -> None:
    """Record what counts, before anything else is written, and take over the notes of earlier drivers.

    Args:
        sink: where the run stands.
        claim: the driver's.
        counted: every unit that counts.
        committed: the units that are not to be done again.
        only: slugs of the shards that are the driver's; None where all are.

    Raises:
        RunAborted: another driver has taken the folder over.
        SinkError: the folder cannot be listed, or something cannot be written or removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    before = Baselines(fs, root)
    baseline = Baseline.of(counted, claim.generation, only=only)
    notes = [note for note in notes_there(fs, root) if baseline.speaks_of(split_unit_id(note.unit)[0])]
    take_over([note for note in notes if _goes_on(note, before, committed)], sink, claim.generation)
    temporary = _temporary(root) if isinstance(fs, LocalFileSystem) else ()  # other stores put whole objects
    put_baseline(sink, baseline, claim)
    for note in notes:
        if note.generation < claim.generation:
            remove(fs, f"{root}/{note_path(note.unit, note.generation)}")
    forget_stops(sink)
    for path in temporary:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - OLD_S:
                path.unlink()


def _goes_on(note: Note, before: Baselines, committed: Committed) -> bool:
    """Whether a note is of a unit that is to be done, and no driver had begun after the one whose worker wrote it."""
    began = before.of(split_unit_id(note.unit)[0])
    return not committed.has(note.unit) and (began is None or note.generation >= began.generation)


def put_baseline(sink: SinkConfig, baseline: Baseline, claim: Claim) -> None:
    """Record what counts, then check the lock: from then on, what was listed before and is noise now may go.

    Raises:
        RunAborted: another driver has taken the folder over.
        SinkError: the store fails.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    replaced = [one for one in Baselines(fs, root).all if baseline.replaces(one)]
    put(fs, f"{root}/{baseline_path(baseline.generation)}", baseline.to_bytes())
    claim.check()
    for one in replaced:
        remove(fs, f"{root}/{baseline_path(one.generation)}")


def remove_leftovers(sink: SinkConfig, claim: Claim, baseline: Baseline, noise: Iterable[str]) -> None:
    """Remove what does not count: other commits of committed units, and files of no commit.

    Raises:
        RunAborted: another driver has taken the folder over; nothing is removed.
        SinkError: the folder cannot be listed, or something cannot be removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    fs.invalidate_cache()
    going = [*noise, *([] if sink.shard_size else strays(fs, root, baseline))]
    claim.check()
    for path in going:
        remove(fs, f"{root}/{path}")


def strays(fs: AbstractFileSystem, root: str, baseline: Baseline) -> Iterator[str]:
    """Files of units that are never merged, and belong to no commit that counts, relative to the run's folder."""
    for kind in KINDS:
        for path in sorted(list_folder(fs, f"{root}/{kind}")):
            name = posixpath.basename(path)
            if found := PART_NAME.fullmatch(name):
                slug, chunk = split_unit_id(found[1])
                if baseline.speaks_of(slug) and not baseline.generations(slug).get(int(found[2]), 0) >> int(chunk) & 1:
                    yield f"{kind}/{name}"


def _temporary(root: str) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        for name in names:
            if is_temporary(name):
                yield Path(folder, name)
