"""Open storage by URL, retry errors that may pass, and say what a store's error means to the user."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec import AbstractFileSystem as FileSystem
from fsspec.implementations.local import LocalFileSystem
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from pipeline.common.showing import describe, has_password, public_url
from pipeline.common.special_files import is_special
from pipeline.errors import ShardeditError, SourceError

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds; doubles with every attempt, plus up to a second of jitter
LONGEST_WAIT = 20.0  # seconds

WITH_PASSWORD = ("ftp://", "sftp://", "ssh://", "http://", "https://", "smb://", "webdav")  # may stand in the address

# No second attempt changes these: nothing is there, it is no file, access is refused, or the disk is full.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_FINAL_ERRNOS = {6, 28, 30, 36, 40, 122}  # no file, no space, read-only, name too long, a link to itself, quota
# Connection and timeout errors that are no OSError; by name, since not all of these libraries are installed. None: all
# errors of a library. Wrong or absent credentials are errors of botocore, too, and final.
_PASSING = {
    "aiohttp": None,
    "botocore": {
        "ConnectionClosedError",
        "ConnectionError",
        "ConnectTimeoutError",
        "EndpointConnectionError",
        "HTTPClientError",
        "IncompleteReadError",
        "ProxyConnectionError",
        "ReadTimeoutError",
        "ResponseStreamingError",
    },
    "fsspec": {"FSTimeoutError"},
    "urllib3": None,
}


class LocalFiles(LocalFileSystem):
    """The disks of this machine, whose named pipes, sockets and devices are refused: to open one may wait for ever."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if is_special(self._strip_protocol(path)):
            raise OSError(errno.ENXIO, "It is a named pipe, a socket or a device, no file", path)
        return super()._open(path, mode, block_size, **options)


def is_local(fs: FileSystem) -> bool:
    """Whether it is a disk, with folders and paths of this machine."""
    return isinstance(fs, LocalFileSystem)


def open_fs(url: str, storage_options: Mapping[str, Any]) -> tuple[FileSystem, str]:
    """The file system of a URL and the path in it. Called where it is used: an open file system is sent nowhere.

    Args:
        url: any fsspec URL, `file://` or a bare local path.
        storage_options: for fsspec; what is left out comes from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID).

    Raises:
        SourceError: no such kind of storage, or its package is not installed.
    """
    if has_password(url) and not url.startswith(WITH_PASSWORD):
        raise SourceError(
            f"the address {public_url(url)} was given with a user and a password, which this kind of storage does not "
            "read from there. Put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or into "
            "storage_options"
        )
    options = dict(storage_options)
    scheme, separator, path = url.partition("://")
    if not separator or scheme in ("file", "local"):
        # Not by its URL: in a path of this machine "::" is no chain of file systems.
        with _opening(url):
            if "protocol" in options:
                raise ValueError("a path of this machine has no protocol to choose")
            return LocalFiles(**options), local_path(path if separator else url)
    with _opening(url):
        if url.startswith(("s3://", "s3a://")):
            # Newer botocore adds checksums that not every store of this protocol knows: some refuse puts with them,
            # some answer a range with the checksum of the whole object. Manifests carry their own.
            options["config_kwargs"] = {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                **options.get("config_kwargs", {}),
            }
        fs, root = fsspec.core.url_to_fs(url, **options)
        if url.startswith(("s3://", "s3a://")) and not root.strip("/"):
            raise ValueError("it names no bucket")
        return fs, root.rstrip("/") or root


@contextmanager
def _opening(url: str) -> Iterator[None]:
    """Turn what storage libraries raise on an address or options that they cannot use: errors of every class."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError) and url.startswith(("s3://", "s3a://")):
            way_out = "Install the extra for S3: pip install 'shardedit[s3]'"
        else:
            way_out = "Check the address, and the storage_options that go with it"
        raise SourceError(f"{public_url(url)} cannot be opened: {describe(error)}. {way_out}") from error


def local_path(path: str) -> str:
    """A path of this machine, absolute and without an end slash; "~" stands for a home.

    Raises:
        ValueError: no path may be like this, or its "~" names no home.
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{path.partition('/')[0]} names no home here")
    os.fsencode(expanded)  # half of a surrogate pair has no bytes
    try:
        return os.path.abspath(expanded).rstrip("/") or "/"
    except FileNotFoundError as error:
        raise ValueError("it is relative, and the folder that this process works in is gone") from error


def is_transient(error: BaseException) -> bool:
    """Whether another attempt from a fresh open may succeed: broken connections, timeouts, short reads."""
    if isinstance(error, (ShardeditError, *_FINAL)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNOS
    for cls in type(error).__mro__:
        names = _PASSING.get(cls.__module__.partition(".")[0], ())
        if names is None or cls.__name__ in names:
            return True
    return False


def retrying() -> Retrying:
    """Attempts, each from a fresh open, with exponential waits and jitter; the last error is raised unchanged."""
    return Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT),
        retry=retry_if_exception(is_transient),
        reraise=True,
    )


def source_error(error: BaseException, url: str) -> SourceError:
    """What a storage error means to the user, and what to do."""
    where = public_url(url)
    if isinstance(error, FileNotFoundError):
        return SourceError(f"{where} does not exist. Check source.shards: the bucket, the folder and the spelling")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return SourceError(
            f"{where} may not be read: access was refused ({describe(error)}). Check the credentials "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the worker's role, or source.storage_options) and their rights"
        )
    if "Connect" in type(error).__name__ or isinstance(error, ConnectionError):
        return SourceError(
            f"{where} cannot be reached ({describe(error)}). Check AWS_ENDPOINT_URL or "
            "source.storage_options.client_kwargs.endpoint_url, and the network"
        )
    return SourceError(f"{where} cannot be read ({describe(error)}). Check source.shards and the storage's health")


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a store raises inside the block into a `SourceError`; errors of our own pass."""
    try:
        yield
    except ShardeditError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or is_transient(error) or _comes_from_a_library(error):
            raise source_error(error, url) from error
        raise


def _comes_from_a_library(error: BaseException) -> bool:
    """Whether a library raised it: some check options and patterns only when these are first used."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and not trace.tb_frame.f_globals.get("__name__", "").startswith("pipeline.")
