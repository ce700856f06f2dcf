"""Whatever field of a run's records is changed, `shardedit verify` says so; and what it says it repairs, it repairs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.errors import SinkError
from pipeline.looking.findings import Inspection
from pipeline.looking.runs import find_run
from pipeline.looking.verify import verify
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing.manifest import Manifest
from tests.looking.test_verify import shardedit
from tests.runs import recipe_data, write_shards

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one shard in three units, the last with one row; a row of the first is in quarantine."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder / "in", shards=1, rows=5, damaged=(1,))
    data = recipe_data(folder / "in", folder / "out", sink={"shard_size": 0}, engine="local")
    driver.run(recipe_from(data), progress="off")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of its folder, beside a recipe and the input."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    data = recipe_data(tmp_path / "in", tmp_path / "out", sink={"shard_size": 0}, engine="local")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "out"


def inspected(run: Path, **settings: Any) -> Inspection:
    found = find_run(str(run.parent / "recipe.yaml"))
    return verify(found.sink, found.record, **{"source": found.source, **settings})


def first_manifest(run: Path) -> Path:
    return min((run / "_units").rglob("*.json"))


def fields(data: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all values of a manifest."""
    if isinstance(data, dict):
        return [path for name, item in data.items() for path in fields(item, (*at, name))]
    if isinstance(data, list):
        return [path for number, item in enumerate(data) for path in fields(item, (*at, number))]
    return [at]


def changed(value: Any) -> Any:
    """Another value that could stand in its place."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return ("0" if value[:1] != "0" else "1") + value[1:]


def test_whatever_is_changed_in_a_manifest_is_found(run: Path) -> None:
    path = first_manifest(run)
    before = json.loads(path.read_text())
    paths = fields(before)
    assert {str(at[0]) for at in paths} == set(Manifest.model_fields)
    assert inspected(run).clean
    unseen = []
    for at in paths:
        data = json.loads(json.dumps(before))
        part = data
        for step in at[:-1]:
            part = part[step]
        part[at[-1]] = changed(part[at[-1]])
        path.write_text(json.dumps(data))
        if inspected(run).clean:
            unseen.append(at)
    assert unseen == []


def test_whatever_is_changed_in_run_json_is_found(run: Path) -> None:
    path = run / "run.json"
    before = json.loads(path.read_text())
    unseen = []
    for name, value in before.items():
        if name == "schema_version":
            continue
        data = json.loads(json.dumps(before))
        first = next(iter(fields(value)))
        part = data
        for step in (name, *first)[:-1]:
            part = part[step]
        last = (name, *first)[-1]
        part[last] = "other" if part[last] is None else changed(part[last])
        path.write_text(json.dumps(data))
        if name == "tuned":  # one of few words: any other is no record of a run
            with pytest.raises(SinkError, match=r"no record of a run \(tuned\."):
                find_run(str(run))
            continue
        found = find_run(str(run))
        if "run record" not in verify(found.sink, found.record).by_kind:
            unseen.append(name)
    assert unseen == []


def test_whatever_is_changed_in_the_summary_is_found_and_written_again(run: Path) -> None:
    path = run / "summary.json"
    before = json.loads(path.read_text())
    for name, value in before.items():
        if name in ("units_now", "generation"):  # what the command adds; whose it is says only how to call a wrong one
            continue
        other = {"stage": 9} if isinstance(value, dict) else changed(value)
        path.write_text(json.dumps(before | {name: other}))
        assert inspected(run).by_kind == {"summary": 1}, name
    assert inspected(run, repair=True).repaired
    assert json.loads(path.read_text()) == before | {"units_now": 0, "generation": 2}
    assert inspected(run).clean


def rewrite_first_row(run: Path, **values: Any) -> None:
    """Change columns of a row in data/, in a file whose manifest agrees."""
    file = min((run / "data").iterdir())
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0] |= values
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), buffer)
    file.write_bytes(buffer.getvalue())
    path = first_manifest(run)
    manifest = json.loads(path.read_text())
    record = next(one for one in manifest["files"] if one["path"] == f"data/{file.name}")
    record |= {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("seed", 7),
        ("call_size", 5),
        ("model_digest", "0" * 16),
        ("recipe_hash", "0" * 16),
        ("code_version", "9.9.9"),
        ("method", "cfg"),
    ],
)
def test_a_row_that_was_made_otherwise_is_found_and_made_again(column: str, value: Any, run: Path) -> None:
    rewrite_first_row(run, **{column: value})
    found = inspected(run)
    assert any(one.kind == "rows" and str(value) in one.text for one in found.findings), found.findings
    assert not inspected(run, repair=True).clean
    assert inspected(run).by_kind == {"missing unit": 1}


def test_a_row_that_is_lost_between_two_units_is_found(run: Path) -> None:
    """With records that agree in all else: a unit of large rows may end early."""
    path = first_manifest(run)
    manifest = json.loads(path.read_text())
    (quarantine,) = [one for one in manifest["files"] if one["path"].startswith("quarantine/")]
    (run / quarantine["path"]).unlink()
    manifest["files"].remove(quarantine)
    ok = manifest["counts"]["ok"]
    manifest["counts"] |= {"images": 1, "asked": ok, "failed": 0, "failed_by_stage": {}, "failed_by_class": {}}
    path.write_text(json.dumps(manifest | {"stop": 1}))
    (found,) = inspected(run).findings
    assert "it begins with row 2, the unit before it ends before row 1" in found.text


def folder_in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def file_in_place_of(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder for a data file": (lambda run: folder_in_place_of(min((run / "data").iterdir())), "missing file"),
    "folder for a manifest": (lambda run: folder_in_place_of(first_manifest(run)), "missing unit"),
    "folder for the summary": (lambda run: folder_in_place_of(run / "summary.json"), "summary"),
    "file for data": (lambda run: file_in_place_of(run / "data"), "missing file"),
    "file for the manifests": (lambda run: file_in_place_of(run / "_units"), "missing unit"),
    "file for a shard's manifests": (lambda run: file_in_place_of(first_manifest(run).parent), "missing unit"),
    "no report": (lambda run: (run / "report.html").unlink(), "report"),
    "no summary": (lambda run: (run / "summary.json").unlink(), "summary"),
    "half a summary": (lambda run: (run / "summary.json").write_text('{"planned": 3'), "summary"),
    "stray in place": (lambda run: shutil.copy(run / "run.json", run / "data" / "run.json"), "stray file"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_stands_in_the_wrong_place_is_named_and_repaired_as_said(place: str, run: Path) -> None:
    change, kind = PLACES[place]
    change(run)
    found = inspected(run)
    assert kind in found.by_kind, found.findings
    said = shardedit("verify", run.parent / "recipe.yaml")
    assert said.exit_code == 1
    assert ("--repair would: " + ", ".join(found.repairs) if found.repairs else "To repair") in said.stdout
    assert shardedit("verify", run.parent / "recipe.yaml", "--repair").exit_code == 1
    left = inspected(run)
    assert left.clean or set(left.by_kind) == {"missing unit"}, left.findings
    if place in ("folder for a manifest", "file for data"):
        assert shardedit("edit", run.parent / "recipe.yaml").exit_code == 0
        assert inspected(run).clean


def test_a_folder_that_lost_its_run_json_is_told_as_such(run: Path) -> None:
    (run / "run.json").unlink()
    said = shardedit("verify", run)
    assert said.exit_code == 1
    assert "run.json: it is lost" in said.stderr
    (run / "run.json").write_text('{"schema_version": 5, "recipe": {}}')
    said = shardedit("status", run)
    assert "is no record of a run" in said.stderr


# The source ------------------------------------------------------------------------------------------------------


def test_a_shard_that_the_source_has_and_the_run_has_not_is_a_finding(run: Path) -> None:
    source = run.parent / "in"
    shutil.copy(source / "s0.tar", source / "s1.tar")
    (source / "notes.md").write_text("x")
    said = shardedit("verify", run.parent / "recipe.yaml")
    assert said.exit_code == 1
    assert "source: s1.tar: is new since the run began" in said.stdout
    assert "Note: of the source not read: 1 no shard (.md)" in said.stdout
    assert "To repair" not in said.stdout
    (source / "s1.tar").unlink()
    (source / "s0.tar").write_bytes(b"other")
    assert any("has changed" in one.text for one in inspected(run).findings)
    assert shardedit("verify", run.parent / "recipe.yaml", "--no-source").exit_code == 0


def test_a_source_that_is_not_there_is_said_and_nothing_is_called_whole(run: Path) -> None:
    os.rename(run.parent / "in", run.parent / "gone")
    said = shardedit("verify", run.parent / "recipe.yaml")
    assert said.exit_code == 1
    assert "cannot be listed" in said.stdout
    said = shardedit("verify", run.parent / "recipe.yaml", "--no-source")
    assert said.exit_code == 0
    assert "Whole as far as run.json tells" in said.stdout
    assert "Not checked against the source" in said.stdout
    found = find_run(str(run))
    unasked = verify(found.sink, found.record, source=find_run(str(run.parent / "recipe.yaml")).source)
    assert unasked.by_kind == {"source": 1}
    assert verify(found.sink, found.record, source=found.source, source_is_needed=False).clean


@pytest.mark.parametrize(
    ("shards", "is_opened"),
    [
        ("/absolute/in", True),
        ("file:///absolute/in", True),
        ("relative/in", False),
        ("s3://bucket/in", False),
        ("http://169.254.169.254/x.tar", False),
    ],
)
def test_a_folder_alone_makes_verify_open_places_of_this_machine_only(shards: str, is_opened: bool, run: Path) -> None:
    data = json.loads((run / "run.json").read_text())
    data["recipe"]["source"]["shards"] = [shards]
    (run / "run.json").write_text(json.dumps(data))
    assert (find_run(str(run)).source is not None) == is_opened


def test_rows_that_the_footers_count_and_no_unit_holds_are_a_finding(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    from tests.runs import png

    table = pa.table({"image": [png(number) for number in range(4)]})
    pq.write_table(table, tmp_path / "in" / "p.parquet")
    data = recipe_data(tmp_path / "in", tmp_path / "out", sink={"shard_size": 0}, engine="local")
    recipe = recipe_from(data)
    driver.run(recipe, progress="off")
    found = find_run(str(tmp_path / "out"))
    assert verify(found.sink, found.record, source=recipe.source).clean
    paths = sorted((tmp_path / "out" / "_units").rglob("*.json"))
    last = json.loads(paths[-1].read_text())
    for file in last["files"]:
        (tmp_path / "out" / file["path"]).unlink()
    paths[-1].unlink()
    first = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps(first | {"is_last": True}))
    inspection = verify(found.sink, found.record, source=recipe.source)
    assert [one.text for one in inspection.findings if one.kind == "source"] == ["has 4 row(s), its units end after 2"]
