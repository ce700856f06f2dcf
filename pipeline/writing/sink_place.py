"""Whether a run may write where it is told to: not over its own source, and only where a folder can be."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from fsspec.utils import glob_translate

from pipeline.common.showing import about_path, describe, public_url
from pipeline.errors import SinkError
from pipeline.reading.listing import expanded
from pipeline.reading.storage import FileSystem, is_local, open_fs
from pipeline.recipe import Recipe
from pipeline.writing.flags import FOLDER
from pipeline.writing.manifest import KINDS, SUFFIXES


def refuse_sink_over_source(recipe: Recipe) -> None:
    """See that no result would be read as input: by the next start of this run, or by any other.

    Raises:
        SinkError: the sink's folder is one whose files the source reads, or lies in one, under whatever name; or a
            pattern of the source matches files that the sink will have.
    """
    sink_fs, sink = open_fs(recipe.sink.folder, recipe.sink.storage_options)
    for url in recipe.source.shards:
        fs, path = open_fs(url, recipe.source.storage_options)
        if not _is_same_store(fs, sink_fs):
            continue
        is_pattern = re.search(r"[*?\[{]", url) and not (is_local(fs) and os.path.lexists(path))
        if is_pattern and _picks_results(url, recipe):
            raise SinkError(
                f"the pattern {public_url(url)} picks what is written below sink.folder "
                f"{public_url(recipe.sink.folder)} as well: results would be read as input. Set a sink.folder that it "
                "does not reach, or a pattern without **"
            )
        if not is_pattern and _is_in(fs, sink, path):
            raise SinkError(
                f"sink.folder {public_url(recipe.sink.folder)} lies in the source {public_url(url)}: results would be "
                "read as input. Set a sink.folder outside of it, or name the input by a pattern (source.shards)"
            )


def refuse_unusable_sink(recipe: Recipe) -> None:
    """See that a local folder is one, or can be made. A store shows that with the first request.

    Raises:
        SinkError: it is not so; says what stands in its place.
    """
    fs, root = open_fs(recipe.sink.folder, recipe.sink.storage_options)
    if not is_local(fs):
        return
    where = public_url(recipe.sink.folder)
    try:
        there = next(path for path in (Path(root), *Path(root).parents) if os.path.lexists(path))
        is_folder = stat.S_ISDIR(os.stat(there).st_mode)
    except OSError as error:  # a link that leads nowhere, or into itself; a name that is too long
        reason = about_path(error) or describe(error)
        raise SinkError(f"sink.folder {where} cannot be written to: {error.filename}: {reason}. Set another") from error
    if not is_folder or not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        reason = "cannot be written to" if is_folder else "is no folder"
        raise SinkError(f"sink.folder {where}: {there} {reason}. Set another sink.folder, or its permissions")
    if os.path.lexists(lock := f"{root}/{FOLDER}") and not os.path.isdir(lock):
        raise SinkError(f"sink.folder {where}: {lock} is no folder, and the lock needs one. Set another sink.folder")


def _is_same_store(fs: FileSystem, other: FileSystem) -> bool:
    return type(fs) is type(other) and getattr(fs, "endpoint_url", None) == getattr(other, "endpoint_url", None)


def _is_in(fs: FileSystem, path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it; links, ".." and another case of letters are no way round."""
    if not is_local(fs):
        return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    real = Path(os.path.realpath(path))
    return any(_is_one_place(parent, folder) for parent in (real, *real.parents))


def _is_one_place(path: Path, folder: str) -> bool:
    try:
        return os.path.samefile(path, folder)
    except OSError:  # one of them is not there yet
        return str(path) == os.path.realpath(folder)


def _picks_results(url: str, recipe: Recipe) -> bool:
    """Whether a pattern of the source picks files that a run writes into the sink's folder."""
    fs, sink = open_fs(recipe.sink.folder, recipe.sink.storage_options)
    if is_local(fs):
        sink = os.path.realpath(sink)
    suffix = SUFFIXES[recipe.sink.format]
    written = [f"{sink}/{kind}/train-0.{suffix}" for kind in KINDS] + [f"{sink}/_parts/data/x/0"]
    for one in expanded(url):
        _, pattern = open_fs(one, recipe.source.storage_options)
        if is_local(fs):
            base = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]
            pattern = os.path.realpath(base or "/").rstrip("/") + pattern[len(base) :]
        try:
            matches = re.compile(glob_translate(pattern)).match
        except ValueError:  # no pattern: listing says so
            return False
        if any(matches(path) for path in written):
            return True
    return False
