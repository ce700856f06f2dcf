"""Where runs read and write: files of this machine, an S3 server with conditional puts, and one without."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.moto import moto_server
from tests.servers import LISTING_CACHE_S, s3_server

ONE, FEW, MANY = "one", "few", "many"  # inputs: units for a slow store, for one process, and for a cluster
ON_RAY = "Ray, "  # begin of a store's name, where a cluster works on it
PARTED = " in four shards"  # end of one, where several jobs share a run
NAMES = ("files", "S3", "S3 without conditions")


@dataclass(frozen=True, kw_only=True)
class Store:
    """One of them. Inputs stand below `inputs`, runs write to folders of their own below `runs`."""

    name: str
    inputs: str
    runs: str
    root: Path | None = None  # where the runs' folders can be looked at; None: they must be fetched
    environment: Mapping[str, str] = field(default_factory=dict)  # how a driver reaches it
    settle_s: float = 0.0
    input: str
    run: Mapping[str, Any] = field(default_factory=lambda: {"engine": "local"})  # section of recipes

    @property
    def source(self) -> str:
        """What runs read."""
        return f"{self.inputs}/{self.input}"

    def with_more(self, name: str) -> Store:
        """The same under another name, with more to do: for runs on a cluster, or of several jobs."""
        run = {"engine": "ray", "workers": 2} if name.startswith(ON_RAY) else self.run
        return replace(self, name=name, input=MANY, run=run)

    def folder(self, name: str) -> str:
        """A run's."""
        return f"{self.runs}/{name}"

    @property
    def endpoint(self) -> str:
        """Of an S3 server."""
        return self.environment["AWS_ENDPOINT_URL"]

    def _remote(self) -> Any:
        import s3fs

        os.environ.update(self.environment)
        return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def fill(self, source: Path, folder: str) -> None:
        """Copy a folder of this machine to a run's. In a process of its own: it may start threads."""
        if self.root is not None:
            shutil.copytree(source, self.root / Path(folder).name)
            if self.environment:
                time.sleep(2 * LISTING_CACHE_S)
            return
        fs = self._remote()
        for path in sorted(source.rglob("*")):
            if path.is_file():
                fs.pipe_file(f"{folder}/{path.relative_to(source).as_posix()}", path.read_bytes())

    def fetch(self, folder: str, into: Path) -> Path:
        """A run's folder as one of this machine. In a process of its own."""
        if self.root is not None:
            return self.root / Path(folder).name
        fs = self._remote()
        root = folder.removeprefix("s3://") + "/"
        for path in fs.find(root):
            target = into / path.removeprefix(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(fs.cat_file(path))
        return into

    def clear(self, folder: str) -> None:
        """Remove a run's folder. In a process of its own."""
        if self.root is not None:
            shutil.rmtree(self.root / Path(folder).name, ignore_errors=True)
            return
        fs = self._remote()
        if fs.find(folder):
            fs.rm(folder, recursive=True)


def base_of(name: str) -> str:
    """The store itself."""
    return name.removeprefix(ON_RAY).removesuffix(PARTED)


def _files(work: Path, inputs: Path) -> Store:
    (work / "files").mkdir(exist_ok=True)
    return Store(name="files", input=FEW, inputs=str(inputs), runs=str(work / "files"), root=work / "files")


@contextmanager
def stores(names: Iterable[str], work: Path, inputs: Path, aside: Callable[..., Any]) -> Iterator[dict[str, Store]]:
    """The stores of these names, their input in place.

    Args:
        names: of `NAMES`, or these with `ON_RAY` before or `PARTED` after them.
        work: a folder for what they hold.
        inputs: a folder with one for each input.
        aside: calls something in a process of its own.
    """
    plain = {base_of(name) for name in names}
    made: dict[str, Store] = {}
    with ExitStack() as stack:
        if "files" in plain:
            made["files"] = _files(work, inputs)
        if "S3 without conditions" in plain:
            server = stack.enter_context(s3_server(work / "rclone"))
            shutil.copytree(inputs, server.root / "input")
            (server.root / "runs").mkdir()
            time.sleep(2 * LISTING_CACHE_S)
            made["S3 without conditions"] = Store(
                name="S3 without conditions",
                input=ONE,
                inputs="s3://input",
                runs="s3://runs",
                root=server.root / "runs",
                environment=server.environment,
                settle_s=0.25,
            )
        if "S3" in plain:
            endpoint = stack.enter_context(moto_server()).endpoint
            environment = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_ENDPOINT_URL": endpoint}
            environment |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
            store = Store(
                name="S3", input=ONE, inputs="s3://input", runs="s3://runs", environment=environment, settle_s=0.05
            )
            aside(_make_buckets, store, inputs)
            made["S3"] = store
        yield {name: made[name] if name in made else made[base_of(name)].with_more(name) for name in names}


def _make_buckets(store: Store, inputs: Path) -> None:
    fs = store._remote()
    fs.mkdir("input")
    fs.mkdir("runs")
    for shard in sorted(inputs.glob("*/*")):
        fs.pipe_file(f"input/{shard.relative_to(inputs).as_posix()}", shard.read_bytes())
