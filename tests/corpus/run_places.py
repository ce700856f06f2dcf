"""Sources, sinks and recipes where something else stands, nothing may be read or written, or nobody answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.corpus.commands import LOOKING, READING, STARTING, Situation, World, remove
from tests.corpus.making import PNG

IN_THE_WAY: dict[str, Callable[[Path], Any]] = {
    "a file": lambda path: path.write_text("mine"),
    "a folder": lambda path: (path.mkdir(), (path / "mine.txt").write_text("mine")),
    "a dangling link": lambda path: path.symlink_to("/nowhere/at/all"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
OURS = ("run.json", "summary.json", "report.html", "report", "README.md", "data", "quarantine", "_units", "_shards")
OURS += ("_output", "_parts", "_attempts", "_lock")
# Nobody answers on port 1, and none of these is asked for over a network.
ADDRESSES = ("foo://x/y", "github://x", "reference://x", "dir://x", "generic://x", "jupyter://x", "async_wrapper://x")
ADDRESSES += ("ftp://localhost:1/x", "zip://x", "tar://x", "blockcache://x", "hdfs://x/y", "s3://", "s3:///")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown": ("s3://bucket/x", {"bogus": 1}),
    "a client of a number": ("s3://bucket/x", {"client_kwargs": 5}),
    "an unknown option of the client": ("s3://bucket/x", {"client_kwargs": {"bogus": 5}}),
    "an unknown setting": ("s3://bucket/x", {"config_kwargs": {"bogus": 5}}),
    "settings of a number": ("s3://bucket/x", {"config_kwargs": 5}),
    "an endpoint that is none": ("s3://bucket/x", {"client_kwargs": {"endpoint_url": "nonsense"}}),
    "keys of other types": ("s3://bucket/x", {"key": 5, "secret": [1]}),
    "a protocol": ("IN", {"protocol": "x"}),
    "headers of a number": ("http://localhost:1/a.tar", {"client_kwargs": 3}),
}


def situations() -> Iterator[Situation]:
    """All of them."""
    yield from _sinks()
    yield from _sources()
    yield from _recipes()
    yield from _permissions()
    yield from _named()


def _sinks() -> Iterator[Situation]:
    for name, put in IN_THE_WAY.items():
        if name != "a folder":
            yield Situation("sink", f"{name} in its place", partial(_sink, put=put), says="sink.folder")
            yield Situation("sink", f"{name} above it", partial(_sink, put=put, below="/out"), says="sink.folder")
        for ours in OURS:
            # A link to nothing is replaced by what it hides, and a lock's folder is one; the rest is somebody's.
            may_go = (ours == "_lock" and name == "a folder") or ours == "README.md"
            put_ours = partial(_in_new_sink, put=put, name=ours)
            yield Situation("sink with a file", f"{name} as {ours}", put_ours, refused=None if may_go else True)
    for address in ADDRESSES:
        yield Situation("sink address", address, partial(World.write, sink__folder=address), STARTING[:1], says=address)
    for name, folder in {
        "the source": "in",
        "the source with a slash": "in/",
        "the source with dots": "in/../in/./",
        "below the source": "in/edited",
        "the source by a link": "link",
        "below the source by a link": "link/edited",
    }.items():
        yield Situation("sink over source", name, partial(_over_source, folder=folder), says="read as input")
    for name, pattern in {"all": "in/**", "parquet": "in/**/*.parquet", "folders": "in/out/data/*"}.items():
        make = partial(_over_source, folder="in/out", pattern=pattern)
        yield Situation("sink over source", f"a pattern of {name}", make, says="read as input")
    for name, folder in {"a name of 300 letters": "n" * 300, "a path of 9,000 letters": "n/" * 4500}.items():
        yield Situation("sink", name, partial(_in_root, key="sink__folder", path=folder), says="sink.folder")
    odd = {"in /proc": "/proc/x", "in /sys": "/sys/x", "a device": "/dev/null", "no home": "~nobody-here/x"}
    for name, folder in odd.items():
        yield Situation("sink", name, partial(World.write, sink__folder=folder), STARTING[1:])


def _sources() -> Iterator[Situation]:
    for name, put in IN_THE_WAY.items():
        if name in ("a file", "a folder"):
            continue
        for ending in ("", ".tar", ".parquet", ".png"):
            yield Situation("source", f"{name}{ending}", partial(_source, put=put, path=f"s{ending}"))
            inside = partial(_source, put=put, path=f"e/s{ending}", named="e")
            lost = ending == ".png" and "link" in name  # one image that is lost fails its row alone
            yield Situation("source", f"{name}{ending} in a folder", inside, refused=None if lost else True)
        beside = partial(_source, put=put, path="in/z.txt", named="in")
        yield Situation("source", f"{name} beside a shard", beside, refused=None)
    for name, path in {
        "nothing": "none",
        "nothing that a pattern picks": "in/*.none",
        "a file as a folder": "recipe.yaml/x.tar",
        "a file as a pattern's folder": "recipe.yaml/*.tar",
        "the recipe": "recipe.yaml",
        "a name of 300 letters": "n" * 300,
        "a path of 9,000 letters": "n/" * 4500,
        "a pattern of 9,000 letters": "*/" * 4500,
        "stars in a word": "in/a**b",
        "three stars": "in/***",
        "an open brace": "in/{a",
        "a range backwards of nothing": "none/{5..1}",
        "10^14 names": "none/{0..9999999}{0..9999999}",
        "10^9 names": "none/{0..999}/{0..999}/{0..999}.tar",
        "10^11 names": "none/{0..99999999999}.tar",
        "names of 5,000 digits": "none/{0.." + "9" * 5000 + "}.tar",
    }.items():
        yield Situation("source", name, partial(_in_root, key="source__shards", path=path))
    for address in (
        *ADDRESSES,
        "s3://*/x",
        "hf://x",
        "http://[::1/a.tar",
        "http:///a.tar",
        "/proc/self",
        "/proc/self/*",
    ):
        make = partial(World.write, source__shards=address)
        yield Situation("source address", address, make, STARTING[:1])
    for name, (address, options) in OPTIONS.items():
        yield Situation("source options", name, partial(_options, address=address, options=options), STARTING[:1])
    yield Situation("source", "a folder named like a tar", lambda world: _source(world, Path.mkdir, "x.tar"))
    yield Situation("source", "a socket", lambda world: _source(world, _socket, "s.tar"))
    yield Situation("source", "a file of the kernel's", lambda world: _source(world, _kernels, "k.tar"))
    yield Situation(
        "source", "a link to the kernel's folders", lambda world: _source(world, _kernels_folder, "e/k", "e")
    )


def _recipes() -> Iterator[Situation]:
    commands = (*READING, *STARTING[1:], ("verify", "RECIPE"), ("regenerate", "RECIPE", "x"), ("report", "RECIPE"))
    for name, put in IN_THE_WAY.items():
        if name != "a file":
            yield Situation("recipe file", name, partial(_recipe_file, put=put), commands)
    yield Situation("recipe file", "nothing", lambda world: remove(world.recipe), commands)
    yield Situation("recipe file", "not to be read", lambda world: world.recipe.chmod(0), commands, powerless=True)
    yield Situation("recipe file", "of the kernel's", lambda world: _recipe_file(world, _kernels), commands)


def _permissions() -> Iterator[Situation]:
    """Places where reading or writing is refused, on a run that is finished and on a new one."""
    for place in ("in", "in/a.tar", "out", "out/run.json", "out/data", "out/_units", "out/_output", "out/_lock"):
        make = partial(_chmod, place=place, mode=0)
        yield Situation("no permission", f"to read {place}", make, (*LOOKING, *STARTING), None, "", True, True)
    for place in ("out", "out/data", "out/_units", "out/_lock", "out/_attempts"):
        make = partial(_chmod, place=place, mode=0o555)
        yield Situation("no permission", f"to write {place}", make, (*LOOKING, *STARTING), None, "", True, True)
    for name, mode in {"write": 0o555, "enter": 0o000}.items():
        make = partial(_locked_parent, mode=mode)
        yield Situation("no permission", f"to {name} the sink's parent", make, says="sink.folder", powerless=True)
    for name in ("a.tar", "a.parquet", "a.png"):
        make = partial(_locked_source, name=name)
        yield Situation("no permission", f"to read the only {name}", make, refused=None, powerless=True)


def _named() -> Iterator[Situation]:
    for where in (
        "",
        ".",
        "/",
        "/nowhere",
        "n" * 5000,
        "/proc",
        "/dev/null",
        "/dev/zero",
        "foo://x",
        "x.yaml",
        "a::b",
        "{",
    ):
        commands = tuple((command, where) for command in ("status", "verify", "report", "plan", "edit"))
        yield Situation("named place", where[:20] or "nothing", lambda _: None, (*commands, ("regenerate", where, "x")))
    for where in ("", "../../etc/passwd", "n" * 5000, "a\0b", "/dev/zero"):
        yield Situation("named recipe", repr(where[:20]), lambda _: None, (("config", where),))
    for key in ("", "im9", "im2", "a.tar/im0\n", "\0", "k" * 10_000, "\ud800"):
        commands = (("regenerate", "OUT", key),)
        yield Situation("named result", repr(key[:20]), lambda _: None, commands, has_run=True)
    for option in (("--edit", "none"), ("--method", "none"), ("--edit", "")):
        commands = (("regenerate", "OUT", "im0", *option),)
        yield Situation("named result", " ".join(option), lambda _: None, commands, has_run=True)
    for model in ("", ".", "/nowhere", "ROOT", "RECIPE", "n" * 300, "a\0b"):
        yield Situation(
            "score model", repr(model[:20]), lambda _: None, (("report", "OUT", "--score-model", model),), has_run=True
        )
    for number in ("0", "-1", "x", "9" * 30, "\u0663", ""):
        yield Situation(
            "report results", repr(number), lambda _: None, (("report", "OUT", "--results", number),), None, "", True
        )


def _sink(world: World, put: Callable[[Path], Any], below: str = "") -> None:
    put(world.out)
    world.write(sink__folder=f"{world.out}{below}")


def _in_new_sink(world: World, put: Callable[[Path], Any], name: str) -> None:
    world.out.mkdir()
    put(world.out / name)


def _over_source(world: World, folder: str, pattern: str = "in") -> None:
    (world.root / "link").symlink_to(world.input)
    world.write(sink__folder=f"{world.root}/{folder}", source__shards=f"{world.root}/{pattern}")


def _in_root(world: World, key: str, path: str) -> None:
    world.write(**{key: f"{world.root}/{path}"})


def _source(world: World, put: Callable[[Path], Any], path: str, named: str = "") -> None:
    (world.root / path).parent.mkdir(exist_ok=True)
    put(world.root / path)
    world.write(source__shards=f"{world.root}/{named or path}")


def _options(world: World, address: str, options: dict[str, Any]) -> None:
    shards = str(world.input) if address == "IN" else address
    world.write(source={"shards": shards, "storage_options": options})


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        before = Path.cwd()
        os.chdir(path.parent)  # an address of a socket is short
        one.bind(path.name)
        os.chdir(before)


def _kernels(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


def _kernels_folder(path: Path) -> None:
    path.symlink_to("/proc/self")


def _recipe_file(world: World, put: Callable[[Path], Any]) -> None:
    remove(world.recipe)
    put(world.recipe)


def _chmod(world: World, place: str, mode: int) -> None:
    (world.root / place).chmod(mode)


def _locked_parent(world: World, mode: int) -> None:
    (world.root / "locked").mkdir(mode=mode)
    world.write(sink__folder=f"{world.root}/locked/out")


def _locked_source(world: World, name: str) -> None:
    folder = world.root / "e"
    folder.mkdir()
    (folder / name).write_bytes(PNG)
    (folder / name).chmod(0)
    world.write(source__shards=str(folder))
