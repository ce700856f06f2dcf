"""A benchmark's folder, on any store: its files are strangers' and are read by names that lead nowhere else."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from pipeline.common.showing import describe, public_url
from pipeline.errors import SourceError
from pipeline.reading.storage import open_fs, retrying
from pipeline.writing.files import from_json

MOST_IN_A_NAME = 200  # bytes; systems take 255, and an ending belongs to them
MOST_BYTES = 512 << 20  # of a file that is read whole


def is_plain_name(name: str) -> bool:
    """Whether a stranger's name can be that of a file, and leads nowhere else."""
    is_safe = name not in ("", ".", "..") and not set(name) & set("/\\\0") and name.isprintable()
    return is_safe and len(name.encode()) <= MOST_IN_A_NAME


class Folder:
    """A folder of files that are read whole."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = open_fs(url, storage_options or {})

    def get(self, path: str) -> bytes | None:
        """A file's content, or None where there is none.

        Raises:
            ValueError: the path leads out of the folder.
            SourceError: it cannot be read.
        """
        inside = posixpath.normpath(path)
        if inside.startswith(("/", "..")) or "\\" in path or "\0" in path:
            raise ValueError(f"the path '{path[:200]}' leads out of the folder")
        whole = f"{self.root}/{inside}"
        try:
            size = int(retrying()(self.fs.info, whole)["size"] or 0)
            if size > MOST_BYTES:
                raise SourceError(f"{public_url(self.url)}/{path} has {size} bytes, more than {MOST_BYTES}")
            data: bytes = retrying()(self.fs.cat_file, whole)
            return data
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except SourceError:
            raise
        except Exception as error:  # what stores raise shares no base
            raise SourceError(f"{public_url(self.url)}/{path} cannot be read: {describe(error)}") from error

    def json(self, path: str) -> Any:
        """A JSON file's data.

        Raises:
            SourceError: it is missing, or no JSON.
        """
        data = self.get(path)
        if data is None:
            raise SourceError(f"{public_url(self.url)} has no {path}. Give the folder of the benchmark")
        try:
            return from_json(data)
        except ValueError as error:
            raise SourceError(f"{public_url(self.url)}/{path} is no JSON: {describe(error)}") from error

    def find(self, *endings: str) -> list[str]:
        """Paths below the folder that end so, sorted.

        Raises:
            SourceError: the folder cannot be listed.
        """
        try:
            found = retrying()(self.fs.find, self.root)
        except Exception as error:
            raise SourceError(f"{public_url(self.url)} cannot be listed: {describe(error)}") from error
        return sorted(path.removeprefix(f"{self.root}/") for path in found if path.endswith(endings))

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted.

        Raises:
            SourceError: the folder cannot be listed.
        """
        try:
            entries = retrying()(self.fs.ls, self.root, detail=True)
        except Exception as error:
            raise SourceError(f"{public_url(self.url)} cannot be listed: {describe(error)}") from error
        return sorted(posixpath.basename(one["name"].rstrip("/")) for one in entries if one["type"] == "directory")
