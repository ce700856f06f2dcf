"""A run folder that a stranger made: no command removes, writes or reads anything that is not in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.looking.runs import find_run
from pipeline.looking.status import status
from pipeline.looking.verify import verify
from pipeline.reading.storage import open_fs
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing.commit import committed_units
from pipeline.writing.merged import Merged
from tests.looking.test_verify import shardedit
from tests.runs import asked, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of one shard, its units merged in one of them."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder / "in", shards=1, rows=4)
    for name, size in (("apart", 0), ("merged", 10**9)):
        data = recipe_data(folder / "in", folder / name, sink={"shard_size": size}, engine="local")
        driver.run(recipe_from(data), progress="off")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Copies of both beside a victim, and a recipe for each."""
    (tmp_path / "victim.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "victim.txt").write_text("mine")
    for name, size in (("apart", 0), ("merged", 10**9)):
        shutil.copytree(made / name, tmp_path / name)
        data = recipe_data(made / "in", tmp_path / name, sink={"shard_size": size}, engine="local")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return tmp_path


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def manifest_in(run: Path) -> Path:
    return min((run / "_units").rglob("*.json"))


PATHS = {
    "up": "../victim.txt",
    "up from data": "data/../../victim.txt",
    "absolute": "{root}/victim.txt",
    "backslashes": "..\\victim.txt",
    "folded up": "_parts/data/../../../victim.txt",
    "a control character": "data/part\n.parquet",
    "a record of ours": "run.json",
    "another unit's": "data/part-{slug}-00001.parquet",
    "dot": "data/./x.parquet",
    "empty": "",
}


def everything(folder: Path) -> None:
    """Every command that reads a run, and those that write last."""
    config = folder / "apart.yaml"
    for command in (["status"], ["regenerate", "im00", "--edit", "a"], ["report"], ["verify"], ["verify", "--repair"]):
        done = shardedit(command[0], config, *command[1:])
        assert "fault of shardedit" not in done.output, done.output
    done = shardedit("edit", config)
    assert done.exit_code == 0, done.output


def assert_unharmed(folder: Path) -> None:
    assert (folder / "victim.txt").read_text() == "mine"
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["victim.txt"]
    assert (folder / "elsewhere" / "victim.txt").read_text() == "mine"


@pytest.mark.parametrize("path", PATHS)
def test_a_manifest_that_leads_out_of_the_folder_is_none(path: str, folder: Path) -> None:
    run = folder / "apart"
    manifest = manifest_in(run)
    named = PATHS[path].format(root=folder, slug=manifest.parent.name)
    rewrite(manifest, lambda data: data["files"][0].update(path=named, size=4))
    found = find_run(str(run))
    assert [one.chunk for one in committed_units(found.sink)] == [1]
    seen = verify(found.sink, found.record)
    assert "missing unit" in seen.by_kind
    assert manifest.relative_to(run).as_posix() in {one.path for one in seen.findings}


def test_no_command_removes_what_a_manifest_names_outside(folder: Path) -> None:
    run = folder / "apart"
    rewrite(manifest_in(run), lambda data: data["files"][0].update(path="../victim.txt", size=4))
    everything(folder)
    assert_unharmed(folder)
    assert results(run) == asked(shards=1, rows=4)
    assert shardedit("verify", folder / "apart.yaml").exit_code == 0


def test_names_of_files_that_are_none_of_ours_stop_no_command(folder: Path) -> None:
    run = folder / "apart"
    shutil.copy(manifest_in(run), manifest_in(run).parent / "first-00000001.json")
    for name in (
        "_attempts/x-\N{SUPERSCRIPT TWO}-00000001.json",
        "_shards/-00000001.json",
        "_baseline/x.json",
        "_units/x",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text('{"units": [1, {"unit": "../x-00000"}]}')
    everything(folder)
    assert_unharmed(folder)
    assert results(run) == asked(shards=1, rows=4)


INDEXES: dict[str, Callable[[Any], None]] = {
    "file": lambda index: index["slots"]["data"][0]["file"].update(path="../victim.txt", size=4),
    "contents": lambda index: index["slots"]["data"][0].update(contents="../victim.txt"),
    "contents of nothing": lambda index: index["slots"]["data"][0].update(contents="../victim.txt", file=None),
    "kind": lambda index: index["slots"].update({"..": index["slots"]["data"]}),
    "kinds exchanged": lambda index: index["slots"].update(quarantine=index["slots"]["data"]),
    "a unit's file": lambda index: index["slots"]["data"][0]["file"].update(path="data/part-x-00000.parquet"),
}


@pytest.mark.parametrize("change", INDEXES)
def test_an_index_that_leads_out_of_the_folder_is_none(change: str, folder: Path) -> None:
    run = folder / "merged"
    rewrite(min((run / "_output").glob("index*.json")), INDEXES[change])
    found = find_run(str(run))
    assert Merged(*open_fs(str(run), {})).index is None
    assert not verify(found.sink, found.record, repair=True).clean
    assert_unharmed(folder)
    assert verify(found.sink, found.record).by_kind == {"missing unit": 1}


CONTENTS: dict[str, Callable[[Any], None]] = {
    "file": lambda contents: contents["file"].update(path="../victim.txt"),
    "begins before the file": lambda contents: contents["units"][0].update(start=-4),
    "begins after the file": lambda contents: contents["units"][0].update(start=10**12),
    "rows twice": lambda contents: contents["units"][1].update(start=0),
    "endless": lambda contents: contents["units"][1].update(rows=10**15),
}


@pytest.mark.parametrize("change", CONTENTS)
def test_contents_that_are_not_those_of_their_file_count_as_none(change: str, folder: Path) -> None:
    run = folder / "merged"
    rewrite(min((run / "_output" / "data").iterdir()), CONTENTS[change])
    found = find_run(str(run))
    assert verify(found.sink, found.record).by_kind["missing file"]
    assert list(committed_units(found.sink)) == [one for one in committed_units(found.sink) if not one.counts.ok]


NUMBERS: dict[str, Callable[[Any], None]] = {
    "a chunk that takes all memory": lambda manifest: manifest.update(chunk=10**15),
    "rows without end": lambda manifest: manifest.update(stop=10**15),
    "negative rows": lambda manifest: manifest["counts"].update(ok=-1),
    "no worker": lambda manifest: manifest["measured"].update(workers=0),
    "a number that is none": lambda manifest: manifest["measured"].update(worker_seconds=float("nan")),
    "another unit": lambda manifest: manifest.update(unit="x-00000"),
}


@pytest.mark.parametrize("change", NUMBERS)
def test_numbers_that_no_unit_has_cost_neither_time_nor_memory(change: str, folder: Path) -> None:
    run = folder / "apart"
    rewrite(manifest_in(run), NUMBERS[change])
    found = find_run(str(run))
    assert not verify(found.sink, found.record, repair=True).clean
    assert verify(found.sink, found.record).by_kind == {"missing unit": 1}
    assert status(found.sink, found.record).shards_done == 0


LINKS = [
    "data",
    "quarantine",
    "report",
    "_lock",
    "_units",
    "_units/SLUG",
    "_output",
    "_attempts",
    "_parts",
    "_baseline",
]


@pytest.mark.parametrize("link", LINKS)
def test_a_link_to_a_folder_outside_is_not_followed(link: str, folder: Path) -> None:
    run = folder / "apart"
    place = run / link.replace("SLUG", manifest_in(run).parent.name)
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    place.symlink_to(folder / "elsewhere")
    for command in (["verify", "--repair"], ["edit"], ["report"]):
        done = shardedit(command[0], folder / "apart.yaml", *command[1:])
        assert done.exit_code == 1, done.output
        assert "is a link to" in done.stderr
        assert_unharmed(folder)


def test_a_link_to_a_file_is_replaced_and_what_it_leads_to_stays(folder: Path) -> None:
    run = folder / "apart"
    for path in (manifest_in(run), min((run / "data").iterdir()), run / "summary.json"):
        path.unlink()
        path.symlink_to(folder / "victim.txt")
    (run / "data" / "stray.parquet").symlink_to(folder / "victim.txt")
    everything(folder)
    assert_unharmed(folder)
    assert results(run) == asked(shards=1, rows=4)


def test_the_runs_folder_may_itself_be_a_link(folder: Path) -> None:
    os.rename(folder / "apart", folder / "there")
    (folder / "apart").symlink_to(folder / "there")
    assert shardedit("verify", folder / "apart.yaml", "--repair").exit_code == 0
    assert shardedit("edit", folder / "apart.yaml").exit_code == 0
