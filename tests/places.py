"""Where the runs of a test read and write: a folder of this machine, or a bucket of the S3 server of the session.

What was written is looked at in one way in both: a bucket of `tests/servers.py` is a folder, its objects are files.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import Recipe, SinkConfig, recipe_from
from pipeline.writing.lock import DriverLock
from tests.runs import recipe_data
from tests.servers import LISTING_CACHE_S, S3Server

# The server ignores conditions, so every run would wait two seconds to see whether another driver came first. Here none
# does: tests of the lock itself have times of their own. Drivers in a process of their own begin with this text.
SETTLE = {"settle_s": 0.2}
SETTLE_QUICKLY = f"""
from pipeline.writing.lock import DriverLock
DriverLock.__init__.__kwdefaults__.update({SETTLE})
"""

# For a test of what only an S3 server does: its `place` is the one that the module's other tests have on S3.
only_on_s3 = pytest.mark.parametrize("place", ["s3"], indirect=True)
slow_on_s3 = pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)

_numbers = itertools.count()


@dataclass(frozen=True)
class Place:
    """A folder or a bucket; `source` and `out` in the methods are names of folders in it."""

    kind: str
    root: Path  # where its files can be looked at
    url: str  # of the root
    storage_options: dict[str, Any] = field(repr=False)

    def new(self, name: str = "out") -> str:
        """A name that no other test has."""
        return f"{name}-{next(_numbers)}"

    @property
    def endpoint(self) -> str:
        """Of the S3 server."""
        return str(self.storage_options["client_kwargs"]["endpoint_url"])

    def through(self, endpoint: str, **options: Any) -> Place:
        """The same bucket, reached through a proxy; with further options for fsspec."""
        options = {**self.storage_options, **options, "client_kwargs": {"endpoint_url": endpoint}}
        return replace(self, storage_options=options)

    def settle(self) -> None:
        """To be called after files were changed by hand: the server remembers listings for a moment."""
        if self.kind == "s3":
            time.sleep(2 * LISTING_CACHE_S)

    def recipe_data(self, source: str, out: str, **sections: Any) -> dict[str, Any]:
        """The recipe of `tests/runs.py` as plain data."""
        data = recipe_data(f"{self.url}/{source}", f"{self.url}/{out}", **sections)
        if self.storage_options:
            data["source"]["storage_options"] = data["sink"]["storage_options"] = self.storage_options
        return data

    def recipe(self, source: str, out: str, **sections: Any) -> Recipe:
        """The same, checked; for one process."""
        return recipe_from(self.recipe_data(source, out, engine="local", **sections))

    def folder(self, recipe: Recipe) -> Path:
        """Where the output of one of its recipes can be looked at."""
        return self.root / recipe.sink.folder.rpartition("/")[2]

    def sink(self, out: str) -> SinkConfig:
        """Where a run writes, without the run."""
        return SinkConfig(folder=f"{self.url}/{out}", storage_options=self.storage_options)


def local_place(root: Path) -> Place:
    """A folder of this machine."""
    return Place("local", root, str(root), {})


@contextmanager
def s3_place(server: S3Server) -> Iterator[Place]:
    """A bucket of its own; in this process drivers settle quickly until the block ends."""
    name = f"place-{next(_numbers)}"
    with pytest.MonkeyPatch.context() as patch:
        for setting, value in SETTLE.items():
            patch.setitem(DriverLock.__init__.__kwdefaults__, setting, value)
        yield Place("s3", server.bucket(name), f"s3://{name}", server.storage_options)
