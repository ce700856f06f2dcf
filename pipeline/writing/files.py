"""Files of a run's folder, each there as a whole or not at all: put, streamed, read, listed, removed, on any store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.common.showing import describe, public_url
from pipeline.errors import SinkError
from pipeline.reading.storage import retrying

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Made(Generic[T]):
    """A file that was written piece by piece."""

    by: T  # what the function that wrote it returned
    size: int  # bytes
    sha256: str


TEMPORARY_SUFFIX = ".tmp"


class NotAFileError(SinkError):
    """Where a file of ours should be there is a folder, or a pipe to which nobody may ever write."""


def put(fs: AbstractFileSystem, path: str, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file or none of it: no reader, and no kill, meets a part.

    Args:
        fs: where to.
        path: in it.
        data: the content.
        durable: whether a local file is to outlive a crash of the machine.

    Raises:
        SinkError: says which file, and why not.
    """
    try:
        if isinstance(fs, LocalFileSystem):
            _put_local(Path(path), data, durable)
        else:
            # One upload is atomic on an object store. Never rename there: that is a copy and a delete. A large file
            # goes up in parts, which are no object before the last call completes them: what a killed upload leaves
            # is never listed or read, so nothing here cleans it; a lifecycle rule of the bucket frees its space.
            retrying()(fs.pipe_file, path, data)
    except Exception as error:  # what botocore and aiohttp raise shares no other base
        raise SinkError(
            f"{public_url(path)} cannot be written: {describe(error)}. Check sink.folder, its permissions and its space"
        ) from error


def _put_local(path: Path, data: bytes, durable: bool) -> None:
    _made_locally(path, lambda file: file.write(data), durable)


def put_made(
    fs: AbstractFileSystem, path: str, make: Callable[[BinaryIO], T], name: Callable[[Made[T]], str]
) -> Made[T]:
    """Write a file that `make` writes piece by piece, whole or not at all: for files that are not held in memory.

    An object store gets it from a temporary file of this machine, which needs as much room.

    Args:
        fs: where to.
        path: in it, with the beginning of the name.
        make: writes the content.
        name: gives the file's name in that folder, once it is written.

    Raises:
        SinkError: says which file, and why not.
    """
    try:
        if isinstance(fs, LocalFileSystem):
            return _made_locally(Path(path), lambda file: _measured(file, make), True, name)
        with tempfile.NamedTemporaryFile(prefix="shardedit-", suffix=TEMPORARY_SUFFIX) as file:
            made = _measured(file, make)
            file.flush()
            retrying()(fs.put_file, file.name, f"{posixpath.dirname(path)}/{name(made)}")
            return made
    except SinkError:  # raised by what `make` reads
        raise
    except Exception as error:  # see `put`
        raise SinkError(
            f"{public_url(path)} cannot be written: {describe(error)}. Check sink.folder, its permissions and its "
            "space, and that of this machine's temporary folder"
        ) from error


def _measured(file: Any, make: Callable[[BinaryIO], T]) -> Made[T]:
    made = make(file)
    size = file.tell()
    file.seek(0)
    return Made(made, size, hashlib.file_digest(file, "sha256").hexdigest())


def _made_locally(
    path: Path, make: Callable[[BinaryIO], T], durable: bool = True, name: Callable[[T], str] | None = None
) -> T:
    # In the same directory, since only there a rename is atomic; the dot hides it from `data/*.parquet`.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with _opened_in_new_folders(temporary) as file:
            made = make(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        path = path.with_name(name(made)) if name else path
        with contextlib.suppress(OSError):
            os.rmdir(path)  # an empty folder in the file's place; nothing else is removed by this
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not durable:
        return made
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # or a crash of the machine may forget the new name
    finally:
        os.close(directory)
    return made


def _opened_in_new_folders(path: Path) -> BinaryIO:
    """A new file, its folders made again where a run that was refused has just removed an empty one."""
    for _ in range(3):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "w+b")
    return open(path, "w+b")


@contextmanager
def local_copy(fs: AbstractFileSystem, path: str) -> Iterator[Path]:
    """A file as one of this machine, for reading it more than once without holding it in memory.

    Raises:
        FileNotFoundError: there is none.
        SinkError: it cannot be read.
    """
    if isinstance(fs, LocalFileSystem):
        if not Path(path).is_file():
            raise FileNotFoundError(path)
        yield Path(path)
        return
    with tempfile.NamedTemporaryFile(prefix="shardedit-", suffix=TEMPORARY_SUFFIX) as file:
        try:
            retrying()(fs.get_file, path, file.name)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise SinkError(
                f"{public_url(path)} cannot be read: {describe(error)}. Check sink.folder and its permissions"
            ) from error
        yield Path(file.name)


def put_over_ours(fs: AbstractFileSystem, path: str, data: bytes, mark: bytes) -> None:
    """`put`, unless a file stands there that we did not write: a user may have put one of the same name.

    Args:
        fs: where to.
        path: in it.
        data: the content.
        mark: what each of ours has in its first 4 kB.

    Raises:
        SinkError: such a file stands there, or the file cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        if mark not in _head(fs, path):
            raise SinkError(
                f"{public_url(path)} was not written by shardedit, and is not written over. Move it away, and give the "
                "same command again"
            )
    put(fs, path, data)


def _head(fs: AbstractFileSystem, path: str) -> bytes:
    """A file's first 4 kB.

    Raises:
        FileNotFoundError: there is none.
        SinkError: it cannot be read.
    """
    try:
        see_that_it_is_a_file(fs, path)
        head: bytes = retrying()(fs.cat_file, path, start=0, end=4096)
        return head
    except (FileNotFoundError, SinkError):
        raise
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def from_json(data: bytes) -> Any:
    """What a file of ours holds.

    Raises:
        ValueError: it is no JSON, or none that Python reads: a file may have been damaged, or come from a stranger.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_temporary(path: str) -> bool:
    """Whether a file is one that a local `put` began: a kill leaves it behind, and readers pass over it."""
    name = posixpath.basename(path)
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def see_that_it_is_a_file(fs: AbstractFileSystem, path: str) -> None:
    """Refuse what is no file: reading a named pipe without a writer never ends.

    Raises:
        NotAFileError: something else does.
        OSError: nothing is there, or it may not be looked at.
    """
    if not isinstance(fs, LocalFileSystem):
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not os.path.islink(path):
            raise
        mode = 0
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a folder" if mode else "a link to nothing"
        raise NotAFileError(
            f"{path} cannot be read: it is {what}, where a file of the run is needed. Move it away, or set another "
            "sink.folder"
        )


def get(fs: AbstractFileSystem, path: str) -> bytes | None:
    """A file's content, or None where there is none.

    Raises:
        NotAFileError: something else stands there.
        SinkError: it cannot be read, and may be there.
    """
    try:
        see_that_it_is_a_file(fs, path)
        data: bytes = retrying()(fs.cat_file, path)
        return data
    except (FileNotFoundError, NotADirectoryError):
        return None
    except SinkError:
        raise
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def read_part(fs: AbstractFileSystem, path: str, take: Callable[[BinaryIO], T]) -> T:
    """What `take` reads of a file, for files of which a part is enough; from a fresh open where the store fails.

    Raises:
        SinkError: it cannot be opened or read.
    """

    def attempt() -> T:
        see_that_it_is_a_file(fs, path)
        with fs.open(path, "rb") as opened:
            return take(opened)

    try:
        return retrying()(attempt)
    except SinkError:
        raise
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. To look for damage: shardedit verify"
        ) from error


def remove(fs: AbstractFileSystem, path: str) -> None:
    """Remove a file that may be there.

    Raises:
        SinkError: it cannot be removed, and may be there.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            retrying()(fs.rm_file, path)
    except IsADirectoryError as error:
        try:
            os.rmdir(path)  # an empty one, in a file's place
        except OSError:
            raise NotAFileError(
                f"{public_url(path)} is no file but a folder that is not empty. Move it away"
            ) from error
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be removed: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def list_folder(fs: AbstractFileSystem, path: str) -> dict[str, int]:
    """What stands in a folder, {path: size}; empty where there is no such folder.

    Raises:
        SinkError: it cannot be listed.
    """
    try:
        entries = retrying()(fs.ls, path, detail=True)
        # A file is listed as itself; it holds nothing.
        return {entry["name"]: entry["size"] or 0 for entry in entries if entry["name"].rstrip("/") != path}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be listed: {describe(error)}. Check sink.folder and its permissions"
        ) from error


def size_of(fs: AbstractFileSystem, path: str) -> int | None:
    """Bytes of a file; None where there is none.

    Raises:
        SinkError: the store cannot tell.
    """
    try:
        return int(retrying()(fs.info, path)["size"])
    except FileNotFoundError:
        return None
    except Exception as error:
        raise SinkError(
            f"{public_url(path)} cannot be read: {describe(error)}. Check sink.folder and its permissions"
        ) from error
