"""An S3 server that honours `If-None-Match`, for tests of conditional puts: `moto_server` on loopback.

It lives in an environment of its own under build/, made when it is first needed, since moto wants another botocore than
s3fs allows. It checks no signatures: for those there is `tests/servers.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints-moto.txt"
NO_INDEX = (
    "No matching distribution",
    "Could not find a version",
    "ConnectionError",
    "NewConnectionError",
    "timed out",
)


@dataclass(frozen=True)
class MotoServer:
    """A running server."""

    endpoint: str

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec needs to reach the server."""
        return {"key": "any", "secret": "any", "client_kwargs": {"endpoint_url": self.endpoint}}

    def bucket(self, name: str) -> None:
        """Make a bucket where it is missing."""
        fs = S3FileSystem(**self.storage_options)
        if not fs.exists(name):
            fs.mkdir(name)


def _environment() -> Path:
    """The folder of moto's programs."""
    folder = ROOT / "build" / "moto"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        ready = folder / "ready"
        if not ready.exists() or ready.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
            install = [str(folder / "venv" / "bin" / "pip"), "install", "-q", "moto[server,s3]", "-c", str(CONSTRAINTS)]
            done = subprocess.run(install, capture_output=True, text=True, check=False)
            if done.returncode and any(sign in done.stderr for sign in NO_INDEX):
                pytest.skip("moto is not installed, and pip reaches no package index")
            assert done.returncode == 0, done.stderr
            ready.write_text(wanted)
    return folder / "venv" / "bin"


@contextmanager
def moto_server() -> Iterator[MotoServer]:
    """Serve from memory until the block ends.

    Raises:
        RuntimeError: the server does not answer.
    """
    program = _environment() / "moto_server"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [str(program), "-H", "127.0.0.1", "-p", str(port)],
        env={name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise RuntimeError("moto_server did not answer. Is the loopback interface usable?")
        yield MotoServer(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
