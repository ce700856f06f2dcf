"""A whole run in one process: exactly once, damage into quarantine, budgets, and no secret anywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ray.exceptions import RayTaskError

from pipeline.engine.tuning import Tuning
from pipeline.errors import ClusterError, RecipeError, RunAborted, SinkError, SourceError
from pipeline.looking.regenerate import regenerate
from pipeline.looking.runs import find_run
from pipeline.recipe import Recipe, RunConfig, recipe_from
from pipeline.running import driver
from pipeline.running.on_ray import executor
from pipeline.running.pool import IO_CPUS, Resources, cpu_threads, plan_pool
from pipeline.running.tally import Tally
from pipeline.writing.commit import committed_units
from tests.runs import SECRET, asked, contents, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in", shards=3, rows=5)


def local(source: Path, out: Path, **sections: Any) -> Recipe:
    return recipe_from(recipe_data(source, out, engine="local", **sections))


def test_every_image_edit_and_method_is_asked_for_and_answered_once(source: Path, tmp_path: Path) -> None:
    recipe = local(source, tmp_path / "out")
    summary = driver.run(recipe, progress="off")
    assert results(tmp_path / "out") == asked(shards=3, rows=5)
    assert (summary.planned, summary.done, summary.failed, summary.exit_code) == (30, 28, 2, 0)
    assert summary.failed_by_stage == {"decode": 2}
    assert (summary.units, summary.units_now, summary.images, summary.complete) == (9, 9, 15, True)
    assert summary.images_per_second > 0
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"planned", "done", "failed", "images_per_second"} <= set(written)
    assert written["output_bytes"] == sum(
        path.stat().st_size for folder in ("data", "quarantine") for path in (tmp_path / "out" / folder).iterdir()
    )
    assert (tmp_path / "out" / "report.html").exists()


def test_a_damaged_row_is_quarantined_with_stage_reason_and_bytes_and_its_unit_mates_are_kept(
    source: Path, tmp_path: Path
) -> None:
    driver.run(local(source, tmp_path / "out"), progress="off")
    (file,) = (tmp_path / "out" / "quarantine").iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [(row["id"], row["edit"], row["stage"], row["error_class"]) for row in rows] == [
        ("s0.tar/im03", edit, "decode", "DecodeError") for edit in ("a", "b")
    ]
    assert rows[0]["image"] == b"no image"
    (data_file,) = (tmp_path / "out" / "data").iterdir()
    data = pq.read_table(data_file)
    assert "s0.tar/im02" in data.column("id").to_pylist()


def test_a_finished_run_that_is_asked_for_again_does_nothing(source: Path, tmp_path: Path) -> None:
    recipe = local(source, tmp_path / "out")
    first = driver.run(recipe, progress="off")
    before = contents(tmp_path / "out")
    again = driver.run(recipe, progress="off")
    assert (again.units_now, again.done, again.images_per_second) == (0, first.done, first.images_per_second)
    assert contents(tmp_path / "out") == before


def test_a_torn_file_and_an_orphan_are_replaced_by_the_rerun(source: Path, tmp_path: Path) -> None:
    unmerged = {"sink": {"shard_size": 0}}
    driver.run(local(source, tmp_path / "calm", **unmerged), progress="off")
    recipe = local(source, tmp_path / "torn", **unmerged)
    driver.run(recipe, progress="off")
    first, second, *_ = sorted((tmp_path / "torn" / "data").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    next((tmp_path / "torn" / "_units").glob(f"*/{second.stem[-14:]}.json")).unlink()
    assert driver.run(recipe, progress="off").units_now == 2
    assert contents(tmp_path / "torn") == contents(tmp_path / "calm")


def test_an_empty_source_is_one_clear_error_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(SourceError):
        driver.run(local(tmp_path / "in", tmp_path / "out"), progress="off")
    assert not (tmp_path / "out").exists()


def test_a_run_in_which_everything_fails_is_ended_and_says_so_in_its_summary(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=8, damaged=range(16))
    with pytest.raises(RunAborted, match="3 units in a row"):
        driver.run(local(source, tmp_path / "out", max_consecutive_failed_units=3), progress="off")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["units"], summary["complete"], summary["exit_code"]) == (3, False, 1)


def test_a_share_of_failures_beyond_the_budget_ends_the_run(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=2, rows=8, damaged=range(0, 16, 2))
    with pytest.raises(RunAborted, match=r"max_failed_fraction 0\.2"):
        driver.run(
            local(source, tmp_path / "out", max_failed_fraction=0.2, max_consecutive_failed_units=2), progress="off"
        )
    again = driver.run(local(source, tmp_path / "out", max_failed_fraction=0.6), progress="off")
    assert (again.complete, again.done, again.failed, again.exit_code) == (True, 16, 16, 0)


def test_one_bad_unit_at_the_start_is_no_verdict(source: Path, tmp_path: Path) -> None:
    tally = Tally(RunConfig(max_failed_fraction=0.1, max_consecutive_failed_units=3))
    driver.run(local(source, tmp_path / "out"), progress="off")
    units = [unit for unit in committed_units(local(source, tmp_path / "out").sink) if unit.counts.failed == 0][:3]
    for unit in units[:2]:
        bad = unit.counts.model_copy(update={"ok": 0, "failed": unit.counts.asked})
        assert not tally.add(unit.model_copy(update={"counts": bad}))
    assert tally.add(units[2])  # judged from the third on
    assert "max_failed_fraction" in tally.seen().stop_reason


def test_no_secret_of_the_storage_is_written_anywhere(source: Path, tmp_path: Path) -> None:
    data = recipe_data(source, tmp_path / "out", engine="local")
    data["source"]["storage_options"] = {"auto_mkdir": True, "token": SECRET}
    data["sink"]["storage_options"] = {"auto_mkdir": True, "password": SECRET}
    driver.run(recipe_from(data), progress="off")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_job_does_not_write_into_the_uploaded_copy_of_its_working_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    write_shards(copy / "uploaded", shards=1, rows=1, damaged=())
    monkeypatch.chdir(copy)
    with pytest.raises(RecipeError) as caught:
        driver.run(recipe_from(recipe_data("gone/*.tar", "out", engine="local")), progress="off")
    assert [path for path, _ in caught.value.problems] == ["source.shards", "sink.folder"]
    assert "an absolute path" in str(caught.value)
    assert [path.name for path in copy.iterdir()] == ["uploaded"]
    assert driver.run(recipe_from(recipe_data("uploaded", tmp_path / "out", engine="local")), progress="off").complete
    monkeypatch.chdir(tmp_path)
    assert driver.run(recipe_from(recipe_data(source, "here", engine="local")), progress="off").complete


NOTHING = Resources(cpus=8, gpus=0, max_gpus=0, node_cpus=8, node_gpus=0)
TWO_NODES = Resources(cpus=16, gpus=4, max_gpus=4, node_cpus=8, node_gpus=2)
SCALING = Resources(cpus=4, gpus=0, max_gpus=16, node_cpus=4, node_gpus=0)


@pytest.mark.parametrize(
    ("have", "wish", "workers", "gpus"),
    [
        (NOTHING, {}, 1, 0),
        (NOTHING, {"workers": 3}, 3, 0),
        (TWO_NODES, {}, 4, 1),
        (TWO_NODES, {"gpus_per_worker": 0.5}, 8, 0.5),
        (TWO_NODES, {"gpus_per_worker": 2.0}, 2, 2),
        (TWO_NODES, {"gpus_per_worker": 0.0}, 1, 0),
        (SCALING, {}, 16, 1),
        (SCALING, {"workers": 2, "gpus_per_worker": 8.0}, 2, 8),
    ],
)
def test_the_pool_takes_what_the_cluster_has_or_can_have(
    have: Resources, wish: dict[str, Any], workers: int, gpus: float
) -> None:
    pool = plan_pool(RunConfig(**wish), have)
    assert (pool.workers, pool.gpus_per_worker) == (workers, gpus)
    assert bool(pool.line()) == (gpus == 0)
    line = pool.line(tuning=Tuning(layout="channels_last", execution="compiled"))
    assert "the network runs channels_last, compiled; every kind of call is compiled first" in line


@pytest.mark.parametrize(
    ("have", "wish", "numbers"),
    [
        (NOTHING, {"gpus_per_worker": 1.0}, ["asks for 1 GPU", "there are 0"]),
        (TWO_NODES, {"workers": 5}, ["workers 5", "asks for 5 GPU", "there are 4"]),
        (TWO_NODES, {"workers": 1, "gpus_per_worker": 3.0}, ["at most 2 on one node"]),
        (SCALING, {"workers": 17}, ["asks for 17", "bring them to 16"]),
    ],
)
def test_a_pool_that_can_never_be_is_refused_with_the_numbers(
    have: Resources, wish: dict[str, Any], numbers: list[str]
) -> None:
    with pytest.raises(ClusterError) as caught:
        plan_pool(RunConfig(**wish), have)
    assert all(number in str(caught.value) for number in numbers)


@pytest.mark.parametrize("nodes", [(1,), (1, 1, 1), (2, 2), (8,), (8, 4, 1), (64, 64)])
def test_cpu_workers_fit_and_as_many_as_come_to_stand_on_one_node_leave_room_for_reading_and_writing(
    nodes: tuple[int, ...],
) -> None:
    have = Resources(cpus=sum(nodes), gpus=0, max_gpus=0, node_cpus=max(nodes), node_gpus=0)
    for workers in (1, 2, 3, 4, 7, 64, 200):
        share = plan_pool(RunConfig(workers=workers), have).cpus_per_worker
        assert sum(int(cpus / share) for cpus in nodes) >= workers
        for cpus in nodes:  # the last one that is left, say
            assert cpus - min(workers, int(cpus / share)) * share >= IO_CPUS


@pytest.mark.parametrize(
    ("have", "wish", "pool"),
    [
        (TWO_NODES, {"workers": {"min": 1, "max": 16}}, (4, 1, 16)),
        (TWO_NODES, {"workers": {"min": 2, "max": 3}}, (3, 2, 3)),
        (SCALING, {"workers": {"min": 2, "max": 64}}, (2, 2, 64)),  # what the autoscaler may bring is asked for
        (NOTHING, {"workers": {"min": 1, "max": 3}}, (3, 1, 3)),
        (NOTHING, {"workers": {"min": 1, "max": 64}}, (8, 1, 64)),  # one thread and one CPU each
    ],
)
def test_a_pool_that_may_change_starts_with_what_fits_now(
    have: Resources, wish: dict[str, Any], pool: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    planned = plan_pool(RunConfig(**wish), have)
    assert (planned.workers, planned.fewest, planned.most) == pool
    if not planned.gpus_per_worker:
        assert planned.workers * planned.cpus_per_worker <= have.cpus - IO_CPUS
        assert f"{planned.fewest} to {planned.most} worker(s) on CPU" in planned.line()


def test_the_fewest_workers_of_a_pool_that_may_change_must_fit() -> None:
    with pytest.raises(ClusterError, match=r"run\.workers\.min 5 x .* asks for 5 GPU\(s\); there are 4"):
        plan_pool(RunConfig(workers={"min": 5, "max": 9}), TWO_NODES)


def test_threads_share_the_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [cpu_threads(workers, 8) for workers in (1, 2, 3, 100)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_threads(1, 8) == 3
    assert Counter(cpu_threads(workers, 8) for workers in (1, 2)) == {3: 2}


def test_an_error_of_ours_comes_out_of_rays_wrapping_and_others_become_short() -> None:
    wrapped = RayTaskError("write", "a long traceback", SinkError("no space")).as_instanceof_cause()
    outer = RuntimeError("hundreds of lines")
    outer.__cause__ = wrapped
    for error in (wrapped, outer):
        assert (type(executor.named(error)), str(executor.named(error))) == (SinkError, "no space")
    advised = SinkError(
        "no space\nFailed to write after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."
    )
    assert str(executor.named(advised)) == "no space"
    other = executor.named(RuntimeError("first\n" + "x" * 5000))
    assert type(other) is ClusterError
    assert len(str(other)) < 600
    assert "the same command goes on" in str(other)


def test_a_run_in_this_process_leaves_torch_the_threads_it_had(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        driver.run(local(write_shards(tmp_path / "in", shards=1, rows=1), tmp_path / "out"), progress="off")
        assert torch.get_num_threads() == 3
        assert regenerate(find_run(str(tmp_path / "out")), "s0.tar/im00", edit="a").equal
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
