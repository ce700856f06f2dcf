"""`shardedit verify`: a whole run is clean, every kind of damage is named, and repair plus edit make it whole again."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline import cli
from pipeline.looking.runs import find_run
from pipeline.looking.verify import Inspection, verify
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.writing import folding
from pipeline.writing.lock import DriverLock
from tests.runs import asked, contents, png, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(120)
UNMERGED = {"shard_size": 0}  # for merged files see writing/test_merging.py


def shardedit(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two shards in six units; one row is damaged and in quarantine."""
    folder = tmp_path_factory.mktemp("pristine")
    write_shards(folder / "in", shards=2, rows=5)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_data(folder / "in", folder / "out", sink=UNMERGED, engine="local"), sort_keys=False),
        encoding="utf-8",
    )
    driver.run(recipe_from(yaml.safe_load((folder / "recipe.yaml").read_text())), progress="off")
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's folder, beside a recipe of its own."""
    shutil.copytree(pristine / "out", tmp_path / "out")
    data = recipe_data(pristine / "in", tmp_path / "out", sink=UNMERGED, engine="local")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return tmp_path / "out"


def inspected(folder: Path, *, repair: bool = False) -> Inspection:
    found = find_run(str(folder))
    return verify(found.sink, found.record, repair=repair)


def fold(run: Path) -> None:
    sink = find_run(str(run)).sink
    with DriverLock(sink, lambda _: None) as driver:
        folding.fold_finished_shards(sink, driver.claim)


def first_data(run: Path) -> Path:
    return min((run / "data").iterdir())


def rewrite_rows(run: Path, change: Callable[[pa.Table], pa.Table], *, agree: bool = False) -> None:
    """Change the rows of the first data file; with `agree` its manifest is made to agree."""
    file = first_data(run)
    buffer = io.BytesIO()
    table = change(pq.read_table(file))
    pq.write_table(table, buffer)
    file.write_bytes(buffer.getvalue())
    if not agree:
        return
    path = min(path for path in (run / "_units").rglob("*.json") if file.name in path.read_text())
    manifest = json.loads(path.read_text())
    (record,) = (one for one in manifest["files"] if one["path"] == f"data/{file.name}")
    counts = manifest["counts"]
    counts["asked"] += table.num_rows - counts["ok"]
    counts["ok"] = table.num_rows
    record |= {
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows": table.num_rows,
    }
    path.write_text(json.dumps(manifest))


def flip_a_byte(run: Path) -> None:
    data = bytearray(first_data(run).read_bytes())
    data[len(data) // 2] ^= 1
    first_data(run).write_bytes(bytes(data))


def break_an_image(run: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewrite_rows(run, change, agree=True)


def shrink_a_mask(run: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[0]["mask"]["bytes"] = png(1, 8, 8)
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewrite_rows(run, change, agree=True)


def lose_a_mask(run: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[0]["mask"] = None
        return pa.Table.from_pylist(rows, schema=table.schema)

    rewrite_rows(run, change, agree=True)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "deleted data file": (lambda run: first_data(run).unlink(), "missing file", "lists it"),
    "torn file": (lambda run: first_data(run).write_bytes(first_data(run).read_bytes()[:-50]), "wrong size", "bytes"),
    "flipped byte": (flip_a_byte, "changed bytes", "SHA-256"),
    "doubled row": (
        lambda run: rewrite_rows(run, lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        "rows",
        "(s0.tar/im00, a, ledits_pp) is there 2 times",
    ),
    "doubled row in a manifest that agrees": (
        lambda run: rewrite_rows(run, lambda table: pa.concat_tables([table, table.slice(0, 1)]), agree=True),
        "rows",
        "(s0.tar/im00, a, ledits_pp) is there 2 times",
    ),
    "missing row": (
        lambda run: rewrite_rows(run, lambda table: table.slice(1)),
        "rows",
        "3 row(s) of unit s0-",
    ),
    "missing image in a manifest that agrees": (
        lambda run: rewrite_rows(run, lambda table: table.slice(2), agree=True),
        "rows",
        "row 0 of s0.tar is missing",
    ),
    "image that does not decode": (break_an_image, "does not open", "image of (s0.tar/im00, b, ledits_pp)"),
    "mask of another size": (shrink_a_mask, "does not open", "mask of (s0.tar/im00, a, ledits_pp) is 8 x 8"),
    "lost mask": (lose_a_mask, "does not open", "(s0.tar/im00, a, ledits_pp) has no mask, which its mask_share"),
    "stray file": (
        lambda run: shutil.copy(first_data(run), run / "data" / "part-x.parquet"),
        "stray file",
        "no manifest or index that counts lists it",
    ),
    "uncommitted unit": (
        lambda run: min((run / "_units").rglob("00001-*.json")).unlink(),
        "missing unit",
        "chunk 1 not committed",
    ),
    "broken manifest": (
        lambda run: min((run / "_units").rglob("00001-*.json")).write_text("{"),
        "stray file",
        "is no manifest",
    ),
    "unit of another recipe": (
        lambda run: edit_manifest(run, recipe_hash="0" * 16),
        "manifest",
        "recipe_hash is 0000000000000000",
    ),
}


def edit_manifest(run: Path, **values: Any) -> None:
    path = min((run / "_units").rglob("00001-*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_whole_run_is_clean(run: Path) -> None:
    inspection = inspected(run)
    assert inspection.clean, inspection.findings
    assert (inspection.units, inspection.done, inspection.failed) == (6, 18, 2)
    done = shardedit("verify", run)
    assert done.exit_code == 0
    assert "18 results in data/, 2 in quarantine/" in done.stdout


@pytest.mark.parametrize("folder", ["data", "_units", "_shards"])
def test_what_a_kill_left_of_a_write_is_a_note_and_no_error_and_repair_leaves_it_alone(folder: str, run: Path) -> None:
    (run / folder).mkdir(exist_ok=True)
    left = run / folder / ".part-s0.parquet.4711-0a1b2c3d.tmp"
    left.write_bytes(b"half of it")
    (run / "data" / "part.tmp").write_bytes(b"not hidden, so a reader of data/* would take it")
    assert inspected(run).by_kind == {"stray file": 1}
    assert shardedit("verify", run, "--repair").exit_code == 1
    assert left.exists(), "a worker elsewhere may be about to rename it"
    said = shardedit("verify", run)
    assert (said.exit_code, "1 temporary file," in said.stdout) == (0, True), said.stdout
    assert json.loads(shardedit("verify", run, "--json").stdout)["temporary"] == 1


def repair_as_printed(config: Path) -> None:
    """Do what the last line of `shardedit verify` says."""
    said = shardedit("verify", config)
    assert said.exit_code == 1
    command = said.stdout.strip().splitlines()[-1]
    assert command.endswith(f"shardedit edit {config}")
    if "--repair" in command:
        assert shardedit("verify", config, "--repair").exit_code == 1
    assert shardedit("edit", config).exit_code == 0


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_printed_command_repairs_it(damage: str, run: Path, pristine: Path) -> None:
    do, kind, text = DAMAGE[damage]
    do(run)
    config = run.parent / "recipe.yaml"
    found = inspected(run)
    assert any(one.kind == kind and text in one.text for one in found.findings), found.findings
    repair_as_printed(config)
    assert inspected(run).clean
    assert contents(run) == contents(pristine / "out")


def test_a_damaged_unit_of_a_folded_shard_is_taken_back_alone(
    run: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FOLD_FROM", 1)
    fold(run)
    assert len(list((run / "_shards").iterdir())) == 2
    assert inspected(run).clean
    flip_a_byte(run)
    assert not inspected(run, repair=True).clean
    left = inspected(run)
    assert left.by_kind == {"missing unit": 1}
    assert shardedit("edit", run.parent / "recipe.yaml").exit_code == 0
    assert inspected(run).clean
    assert results(run) == asked(shards=2, rows=5)


def test_a_webdataset_run_is_checked_to_the_last_member(pristine: Path, tmp_path: Path) -> None:
    data = recipe_data(pristine / "in", tmp_path / "out", sink={"format": "webdataset", **UNMERGED}, engine="local")
    driver.run(recipe_from(data), progress="off")
    assert inspected(tmp_path / "out").clean
    tar = first_data(tmp_path / "out")
    broken = tar.read_bytes().replace(b"\x89PNG", b"\x89GNP", 1)
    tar.write_bytes(broken)
    inspection = inspected(tmp_path / "out")
    assert inspection.by_kind == {"changed bytes": 1, "does not open": 1}


def test_a_run_on_s3_is_verified(s3_server: Any, pristine: Path) -> None:
    bucket = s3_server.bucket("verified")
    shutil.copytree(pristine / "out", bucket / "run")
    data = recipe_data(
        pristine / "in",
        "s3://verified/run",
        sink={"storage_options": s3_server.storage_options, **UNMERGED},
        engine="local",
    )
    recipe = recipe_from(data)
    record = find_run(str(pristine / "out")).record
    assert verify(recipe.sink, record).clean
    first_data(bucket / "run").unlink()
    assert verify(recipe.sink, record).by_kind == {"missing file": 1}


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    for command in ("verify", "status"):
        done = shardedit(command, tmp_path)
        assert done.exit_code == 1
        assert "run.json is missing" in done.stderr


@pytest.fixture(scope="module")
def merged_once(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, its units merged into files of about two."""
    folder = tmp_path_factory.mktemp("merged")
    data = recipe_data(pristine / "in", folder / "out", sink={"shard_size": 80_000}, engine="local")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    driver.run(recipe_from(data), progress="off")
    assert len(list((folder / "out" / "data").iterdir())) > 2
    return folder


@pytest.fixture
def merged(merged_once: Path, tmp_path: Path) -> Path:
    """A copy of its folder, beside a recipe of its own."""
    shutil.copytree(merged_once / "out", tmp_path / "out")
    data = yaml.safe_load((merged_once / "recipe.yaml").read_text())
    data["sink"]["folder"] = str(tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return tmp_path / "out"


def test_a_merged_run_is_clean_and_counts_its_files(merged: Path) -> None:
    inspection = inspected(merged)
    assert inspection.clean, inspection.findings
    assert (inspection.units, inspection.done, inspection.failed) == (6, 18, 2)
    assert inspection.files == len(list(merged.glob("data/*"))) + len(list(merged.glob("quarantine/*")))


def copy_the_first(run: Path) -> None:
    shutil.copy(first_data(run), run / "data" / "train-00007-of-00009-0123abcd.parquet")


def unmerge(run: Path) -> None:
    """What a kill leaves that came before the index, were the units' own files still there."""
    next((run / "_output").glob("index-*.json")).unlink()


MERGED_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted file": (lambda run: first_data(run).unlink(), "missing file"),
    "torn file": (lambda run: first_data(run).write_bytes(first_data(run).read_bytes()[:-50]), "wrong size"),
    "flipped byte": (flip_a_byte, "changed bytes"),
    "doubled row": (
        lambda run: rewrite_rows(run, lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        "rows",
    ),
    "missing contents": (lambda run: min((run / "_output" / "data").iterdir()).unlink(), "missing file"),
    "missing index": (unmerge, "missing file"),
    "file of another merging": (copy_the_first, "stray file"),
    "uncommitted unit": (lambda run: min((run / "_units").rglob("00001-*.json")).unlink(), "missing unit"),
    "unit of another recipe": (lambda run: edit_manifest(run, recipe_hash="0" * 16), "manifest"),
}


@pytest.mark.parametrize("damage", MERGED_DAMAGE)
def test_damage_of_merged_files_is_named_and_the_printed_command_repairs_it(
    damage: str, merged: Path, merged_once: Path
) -> None:
    do, kind = MERGED_DAMAGE[damage]
    do(merged)
    found = inspected(merged)
    assert kind in found.by_kind, found.findings
    config = merged.parent / "recipe.yaml"
    repair_as_printed(config)
    assert inspected(merged).clean
    assert contents(merged) == contents(merged_once / "out")
    assert results(merged) == asked(shards=2, rows=5)
