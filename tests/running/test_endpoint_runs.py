"""Runs whose edits a server makes: nothing asked twice, costs that add up, and no trace of the key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.errors import RecipeError, RunAborted, ServerError
from pipeline.looking.planning import plan
from pipeline.looking.printing import show_status, show_summary
from pipeline.looking.regenerate import regenerate
from pipeline.looking.runs import find_run
from pipeline.looking.status import status
from pipeline.looking.verify import verify
from pipeline.recipe import Recipe, recipe_from
from pipeline.remote.pictures import Spent
from pipeline.running import driver, in_process
from pipeline.writing.run_record import read_run_record
from tests.edit_server import EditServer, Reply, edit_server
from tests.runs import write_shards

ROWS = 6
PRICES = {"price_text_tokens": 5.0, "price_image_tokens": 10.0, "price_output_tokens": 40.0}
EACH = (10 * 5 + 20 * 10 + 7 * 40) / 1e6  # by the usage of tests/edit_server.py
KEY = "PLANTED-key-4711"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.remote.tries.growing", lambda _: 0.01)
    monkeypatch.setenv("EDIT_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[EditServer]:
    with edit_server() as running:
        yield running


def recipe_data(server: EditServer, folder: Path, *, out: str = "out", **editing: Any) -> dict[str, Any]:
    if not (folder / "in").exists():
        write_shards(folder / "in", shards=1, rows=ROWS, damaged=())
    return {
        "source": {"shards": str(folder / "in")},
        "edits": {"instruction": "put a hat on it"},
        "model": {"name": "none", "size": 64},
        "inversion": {"method": "noise", "num_steps": 1},
        "editing": {"method": "endpoint", "base_url": server.url, "model": "fake", **PRICES, **editing},
        "sink": {"folder": str(folder / out)},
        "run": {"unit_size": 2, "engine": "local", "max_failed_fraction": 1.0},
    }


def recipe(server: EditServer, folder: Path, **options: Any) -> Recipe:
    return recipe_from(recipe_data(server, folder, **options))


def rows(made: Recipe, kind: str = "data") -> list[dict[str, Any]]:
    files = sorted(Path(made.sink.folder, kind).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_costs_stand_in_rows_and_add_up_in_summary_status_report_and_plan(
    server: EditServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = lambda prompt, attempt: Reply(status=500) if len(server.at) == 1 else Reply()
    made = recipe(server, tmp_path, price_picture=0.01, cost_at_most=0.02)
    planned = plan(made)
    assert (planned.requests, planned.network_rows, planned.seconds) == (ROWS, 0, None)
    assert planned.cost_at_most == pytest.approx(ROWS * 4 * 0.02)
    assert any(f"asks for {ROWS} pictures, in {4 * ROWS} requests at most" in note for note in planned.notes)
    assert not server.at, "a plan asks nothing"
    summary = driver.run(made, progress="off")
    assert (summary.done, summary.network_rows) == (ROWS, 0)
    found = rows(made)
    assert sorted(row["server_requests"] for row in found) == [1] * (ROWS - 1) + [2]
    assert {row["server_model"] for row in found} == {"fake"}
    assert all(row["server_cost"] == pytest.approx(EACH + 0.01) for row in found)
    assert all(row["mask"] is not None and row["reconstruction_psnr"] is None for row in found)
    spent = Spent(
        requests=ROWS + 1,
        input_tokens=30 * ROWS,
        output_tokens=7 * ROWS,
        cost=pytest.approx(ROWS * (EACH + 0.01)),
    )
    assert summary.spent == {"endpoint": spent}
    record = read_run_record(made.sink)
    assert record is not None
    so_far = status(made.sink, record)
    assert so_far.so_far.spent == {"endpoint": spent}
    words = f"{ROWS + 1} requests, {30 * ROWS} tokens read and {7 * ROWS} written, cost 0.06"
    show_summary(summary, made)
    show_status(so_far, "recipe.yaml")
    assert capsys.readouterr().out.count(words) == 2
    assert words in (tmp_path / "out" / "report.html").read_text().replace("<wbr>", "")
    assert verify(made.sink, record).clean


def test_refused_pictures_are_quarantined_with_the_reason_their_costs_count_and_they_are_tried_again_when_told(
    server: EditServer, tmp_path: Path
) -> None:
    server.script = lambda *_: Reply(picture=b"no picture") if len(server.at) <= 2 else Reply()
    made = recipe(server, tmp_path, concurrency=1, tries=2)
    summary = driver.run(made, progress="off")
    assert (summary.done, summary.failed) == (ROWS - 1, 1)
    (failed,) = rows(made, "quarantine")
    assert (failed["stage"], failed["error_class"]) == ("edit", "AnswerError")
    assert failed["message"] == ("the server gave no picture (no_image): what it sent cannot be decoded as a picture")
    assert summary.spent["endpoint"].requests == ROWS + 1
    assert summary.spent["endpoint"].cost == pytest.approx((ROWS + 1) * EACH)
    asked = len(server.at)
    assert driver.run(made, progress="off").failed == 1
    assert len(server.at) == asked
    again = driver.run(made, progress="off", retry_failed=True)
    assert (again.done, again.failed) == (ROWS, 0)
    assert len(server.at) == asked + 1, "what was answered well is not asked again"
    assert again.spent["endpoint"].requests == ROWS


def test_what_was_answered_before_a_unit_was_committed_is_not_asked_again_and_counts_once(
    server: EditServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(server, tmp_path)

    def killed(*_: Any) -> None:
        raise RunAborted("killed")

    with monkeypatch.context() as patched:
        patched.setattr(in_process, "commit", killed)
        with pytest.raises(RunAborted, match="killed"):
            driver.run(made, progress="off")
    before = len(server.at)
    assert before >= 2
    summary = driver.run(made, progress="off")
    assert set(server.asked.values()) == {1}
    assert len(server.at) == ROWS
    assert summary.spent["endpoint"].cost == pytest.approx(ROWS * EACH)


def test_a_killed_process_asks_again_only_what_was_in_flight_and_leaves_no_trace_of_the_key(
    server: EditServer, tmp_path: Path
) -> None:
    server.script = lambda *_: Reply(seconds=60.0 if len(server.at) == 4 else 0.0)
    data = recipe_data(server, tmp_path, concurrency=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    first = begun(tmp_path)
    until = time.monotonic() + 120
    while len(server.at) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    printed = first.communicate(timeout=60)[0]
    assert len(server.at) == 4
    second = begun(tmp_path)
    printed += second.communicate(timeout=200)[0]
    assert second.returncode == 0, printed
    assert sorted(server.asked.values()) == [1] * (ROWS - 1) + [2], "the one that was in flight"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["done"] == ROWS
    assert summary["spent"] == {
        "endpoint": asdict(
            Spent(
                requests=ROWS,
                input_tokens=30 * ROWS,
                output_tokens=7 * ROWS,
                cost=pytest.approx(ROWS * EACH),
            )
        )
    }
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in printed


def begun(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "edit", str(folder / "recipe.yaml"), "--debug"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_wrong_key_ends_the_run_and_no_row_is_blamed(server: EditServer, tmp_path: Path) -> None:
    server.script = lambda *_: Reply(status=401)
    made = recipe(server, tmp_path, concurrency=1)
    with pytest.raises(ServerError, match="the key in EDIT_API_KEY"):
        driver.run(made, progress="off")
    assert len(server.at) == 1
    assert not list(tmp_path.glob("out/quarantine/*"))
    server.script = lambda *_: Reply()
    assert driver.run(made, progress="off").done == ROWS


ON_RAY = """
import sys, ray
from pipeline.recipe import load_recipe
from pipeline.running import driver
ray.init(address="local", num_cpus=3, include_dashboard=False)
print(driver.run(load_recipe(sys.argv[1]), progress="off").done, "done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 401])
def test_two_workers_on_ray_ask_nothing_twice_and_a_wrong_key_is_told_in_the_servers_words(
    server: EditServer, tmp_path: Path, status: int
) -> None:
    server.script = lambda *_: Reply(status=status)
    data = recipe_data(server, tmp_path)
    data["run"] |= {"engine": "ray", "workers": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, str(tmp_path / "recipe.yaml")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    if status == 200:
        assert f"{ROWS} done" in done.stdout, done.stderr
        assert list(server.asked.values()) == [1] * ROWS
    else:
        assert "RunAborted: the editing at 127.0.0.1 answers 401" in done.stderr
    assert KEY not in done.stdout + done.stderr


def test_a_missing_key_is_told_before_anything_is_written(
    server: EditServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDIT_API_KEY")
    made = recipe(server, tmp_path, base_url="https://api.example/v1")
    with pytest.raises(ServerError, match="EDIT_API_KEY is empty"):
        driver.run(made, progress="off")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_result_is_made_again_from_the_kept_answer_and_from_nothing_else(server: EditServer, tmp_path: Path) -> None:
    made = recipe(server, tmp_path)
    driver.run(made, progress="off")
    found = find_run(made.sink.folder)
    assert regenerate(found, "im01").equal
    for path in (tmp_path / "out" / "_answers").iterdir():
        path.unlink()
    gone = regenerate(found, "im01")
    assert not gone.equal
    assert "no longer in the run's _answers/" in gone.differences[0]
    assert len(server.at) == ROWS, "nothing was asked"


def test_another_method_beside_it_reads_its_model_and_has_no_costs(server: EditServer, tmp_path: Path) -> None:
    data = recipe_data(server, tmp_path)
    noise = data.pop("inversion")
    data["methods"] = {
        "remote": {"inversion": noise, "editing": data.pop("editing")},
        "here": {"inversion": {"method": "ddim", "num_steps": 2}, "editing": {"method": "reconstruct"}},
    }
    data["model"] = {"name": "analytic", "size": 64}
    made = recipe_from(data)
    planned = plan(made)
    assert (planned.requests, planned.network_rows) == (ROWS, 4 * ROWS)
    summary = driver.run(made, progress="off")
    assert summary.done == 2 * ROWS
    assert list(summary.spent) == ["remote"]
    for row in rows(made):
        assert (row["server_cost"] is None) == (row["method"] == "here")
        assert (row["reconstruction_psnr"] is None) == (row["method"] == "remote")


def test_a_model_that_nobody_reads_is_not_loaded_and_settings_of_asking_make_no_other_run(
    server: EditServer, tmp_path: Path
) -> None:
    data = recipe_data(server, tmp_path)
    with pytest.raises(RecipeError, match="no method reads a model"):
        driver.run(recipe_from({**data, "model": {"name": "analytic"}}), progress="off")
    with pytest.raises(RecipeError, match="reads a model, and model"):
        driver.run(recipe_from({**data, "editing": {"method": "cfg"}, "edits": {"target_prompt": "x"}}), progress="off")
    other = recipe(server, tmp_path, concurrency=2, tries=9, timeout_s=5, key_env="OTHER")
    assert other.hash == recipe_from(data).hash
    assert recipe(server, tmp_path, model="other").hash != other.hash
