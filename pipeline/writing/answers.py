"""Where answers of servers are kept: a file for each in a folder of a run, on any store."""

from __future__ import annotations

from pipeline.reading.storage import FileSystem, open_fs
from pipeline.recipe import SinkConfig
from pipeline.remote.journal import FAILED, Store
from pipeline.writing.files import get, list_folder, put, remove
from pipeline.writing.paths import ANSWERS


class FolderStore(Store):
    """Files of one folder. Workers of a run share it.

    Args:
        fs: of the folder.
        root: its path.
    """

    def __init__(self, fs: FileSystem, root: str) -> None:
        self._fs, self._root = fs, root

    def names(self) -> set[str]:
        """Of all files; none where there is no such folder yet."""
        return {path.rpartition("/")[2] for path in list_folder(self._fs, self._root)}

    def get(self, name: str) -> bytes | None:
        """A file; None where it is gone."""
        return get(self._fs, f"{self._root}/{name}")

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file. What a crash of the machine costs is asked again, and no more."""
        put(self._fs, f"{self._root}/{name}", data, durable=False)


def answers_of(sink: SinkConfig) -> FolderStore:
    """The answers of servers that edit, of a run."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    return FolderStore(fs, f"{root}/{ANSWERS}")


def forget_failed_answers(sink: SinkConfig) -> None:
    """Let servers be asked again where they gave no edit."""
    fs, root = open_fs(sink.folder, sink.storage_options)
    for path in list_folder(fs, f"{root}/{ANSWERS}"):
        if path.endswith(FAILED):
            remove(fs, path)
