"""Whole evaluations by the command: edited, measured, judged, resumed, compared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import RecipeError, RunAborted, SinkError, SourceError
from pipeline.evaluation.config import EvaluateConfig, evaluation_from, load_evaluation
from pipeline.evaluation.job import run as job
from pipeline.evaluation.job.counted import counts_of
from pipeline.evaluation.job.run import Evaluation, evaluate
from pipeline.evaluation.score_rows import rows_in
from pipeline.writing.rows import encode_mask, encode_png
from tests.evaluation.fake_judge import FakeJudge, Reply, fake_judge

METHODS: dict[str, Any] = {
    "strong": {"inversion": {"method": "ddim", "num_steps": 3}, "editing": {"method": "cfg", "guidance_scale": 3.0}},
    "weak": {"inversion": {"method": "ddim", "num_steps": 3}, "editing": {"method": "cfg", "guidance_scale": 1.5}},
}


def drawn(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "set": {"kind": "drawn", "count": 12, "size": 32},
        "model": {"name": "analytic", "size": 32},
        "methods": METHODS,
        "statistics": {"resamples": 199},
        "sink": {"folder": str(folder)},
        "run": {"engine": "local", "unit_size": 4, "call_size": 4},
        **more,
    }


def done(data: dict[str, Any], **more: Any) -> Evaluation:
    return evaluate(evaluation_from(data), progress="off", **more)


def written(folder: Path) -> dict[str, bytes]:
    """What a second run must write again, by path."""
    inside = folder / "evaluate"
    paths = [path for path in sorted(inside.rglob("*")) if path.is_file() and "_lock" not in path.parts]
    kept = {path.relative_to(inside).as_posix(): path.read_bytes() for path in paths}
    return {
        name: data for name, data in kept.items() if not name.startswith(("evaluation.json", "items.json", "journal/"))
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "evaluate" / "rows").iterdir()) for row in rows_in(path.read_bytes())]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    folder = tmp_path_factory.mktemp("calm")
    return folder, done(drawn(folder))


def test_every_item_of_every_method_has_a_row_with_all_that_is_known_of_it(calm):
    folder, evaluation = calm
    rows = rows_of(folder)
    assert len(rows) == 24 == len({(row["item"], row["method"]) for row in rows})
    assert (evaluation.units, evaluation.units_now, evaluation.exit_code) == (3, 3, 0)
    for row in rows:
        assert row["reason"] == ""
        assert row["seed"] is not None
        assert (row["steps"], row["network_rows"] > 0) == (3, True)
        assert row["truth_psnr"] is not None
        assert row["psnr_unedit_part"] is not None
    weak, strong = ([row["psnr_unedit_part"] for row in rows if row["method"] == name] for name in ("weak", "strong"))
    assert np.mean(weak) > np.mean(strong)
    assert {row["edit_type"] for row in rows} == set("0123456789")


def test_a_second_command_measures_nothing_and_a_second_run_writes_the_same_bytes(calm, tmp_path):
    folder, _ = calm
    before = written(folder)
    assert {"table.md", "table.csv", "table.tex", "pairs.csv", "summary.json", "index.html"} <= set(before)
    assert done(drawn(folder)).units_now == 0
    assert written(folder) == before
    done(drawn(tmp_path))
    assert written(tmp_path) == before


def test_a_run_that_ends_anywhere_goes_on_to_the_same_bytes(calm, tmp_path, monkeypatch):
    puts: list[str] = []

    def dies(fs: Any, path: str, data: bytes, **more: Any) -> None:
        if "/rows/" in path:
            puts.append(path)
            if len(puts) in (2, 3):
                raise RunAborted("killed here")
        job_put(fs, path, data, **more)

    job_put = job.put
    monkeypatch.setattr(job, "put", dies)
    for _ in range(2):
        with pytest.raises(RunAborted):
            done(drawn(tmp_path))
    assert done(drawn(tmp_path)).units_now == 2
    assert written(tmp_path) == written(calm[0])


def test_methods_share_inversions_and_the_plan_counts_them(tmp_path):
    found = counts_of(evaluation_from(drawn(tmp_path)))
    assert (found.items, found.results, found.excluded) == (12, 24, {})
    # An inversion of 3 steps, and one row (or two: guided) per step and method.
    assert found.network_rows is not None
    assert found.network_rows_alone is not None
    assert found.network_rows < found.network_rows_alone
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_page_stands_alone_and_holds_what_strangers_wrote_as_text(calm):
    folder, _ = calm
    page = (folder / "evaluate" / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert page.count('<section class="item"') == 12
    assert page.count("<svg") >= 3
    assert "strong" in page


def test_another_evaluation_in_the_same_folder_is_refused(calm):
    with pytest.raises(SinkError, match="another evaluation"):
        done(drawn(calm[0], set={"kind": "drawn", "count": 11, "size": 32}))


def own_set(folder: Path) -> Path:
    """Six rows with a mask for the measures, a truth and two edits; one is no image."""
    rng, path = np.random.default_rng(0), folder / "own.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            region = np.zeros((32, 32), dtype=bool)
            region[: 8 + number] = True
            edits = {"red": {"target_prompt": "red"}, "blue": {"target_prompt": "blue"}}
            members = {
                "png": b"no image" if number == 3 else encode_png(pixels),
                "region.png": encode_mask(region),
                "truth.png": encode_png(pixels),
                "json": json.dumps({"edits": edits, "edit_type": "paint"}).encode(),
            }
            for name, data in members.items():
                member = tarfile.TarInfo(f"r{number}.{name}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return path


def test_a_set_of_ones_own_is_measured_by_its_regions_and_truths_and_failures_count(tmp_path):
    source = {"shards": str(own_set(tmp_path))}
    data = drawn(tmp_path / "out", set={"kind": "own", "source": source})
    evaluation = done(data)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 6 * 2 * 2
    failed = [row for row in rows if row["reason"]]
    assert {row["reason"] for row in failed} == {"failed_decode"}
    assert len(failed) == 4
    assert evaluation.tables.reasons["strong"] == {"failed_decode": 2}
    assert evaluation.tables.lines["truth_psnr"]["strong"].own.n == 10
    assert {row["edit_type"] for row in rows if not row["reason"]} == {"paint"}
    assert len({row["image"] for row in rows}) == 6, "edits of one image are one witness"


def imgedit(folder: Path) -> dict[str, Any]:
    """A small ImgEdit-Bench, and results of one method."""
    table = {}
    (folder / "origin").mkdir(parents=True)
    (folder / "made").mkdir()
    for number in range(6):
        picture = np.full((24, 24, 3), number, dtype=np.uint8)
        (folder / "origin" / f"{number}.png").write_bytes(encode_png(picture))
        (folder / "made" / f"{number}.png").write_bytes(encode_png(picture + 100))
        table[str(number)] = {"id": f"{number}.png", "prompt": f"Add {number}.", "edit_type": "add"}
    (folder / "basic_edit.json").write_text(json.dumps(table))
    return {
        "set": {"kind": "imgedit_bench", "folder": str(folder)},
        "results": {"made": str(folder / "made")},
        "sink": {"folder": str(folder / "out")},
        "statistics": {"resamples": 199},
    }


def judge_of(judge: FakeJudge, **more: Any) -> dict[str, Any]:
    return {"base_url": judge.url, "model": "fake", "concurrency": 2, **more}


KILLED = """
import sys, yaml
from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.job.run import evaluate
evaluate(evaluation_from(yaml.safe_load(sys.stdin)), progress="off")
"""


def test_a_killed_judge_run_goes_on_asks_nothing_twice_and_ends_with_the_same_bytes(tmp_path):
    def script(digest: str, part: str, attempt: int) -> Reply:
        if part == "sc" and digest[0] in "0123456" and attempt == 0:
            return Reply(content="words first", seconds=0.02)
        return Reply(seconds=0.02)

    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    with fake_judge(script) as judge:
        done(imgedit(tmp_path / "calm") | {"judge": judge_of(judge)})
        asked_calmly = dict(judge.asked)
    with fake_judge(script) as judge:
        data = imgedit(tmp_path / "killed") | {"judge": judge_of(judge)}
        child = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, env=os.environ.copy())
        assert child.stdin is not None
        child.stdin.write(yaml.safe_dump(data).encode())
        child.stdin.close()
        journal = tmp_path / "killed" / "out" / "evaluate" / "journal"
        while child.poll() is None and len(list(journal.glob("*.json"))) < 3:
            time.sleep(0.005)
        child.kill()
        child.wait()
        answered = len(list(journal.glob("*.json")))
        assert 3 <= answered < 12
        before = sum(judge.asked.values())
        evaluation = done(data)
        repeated = sum(judge.asked.values()) - before
        assert repeated == evaluation.requests
        assert all(judge.asked[one] - count <= 2 for one, count in asked_calmly.items()), "only what was in flight"
    one, other = (written(tmp_path / name / "out") for name in ("calm", "killed"))
    assert one == other


def test_too_many_rows_without_a_score_fail_the_command_and_retry_asks_them_again(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "FEWEST_JUDGED", 6)
    with fake_judge(lambda *_: Reply(content="words")) as judge:
        data = imgedit(tmp_path) | {"judge": judge_of(judge, tries=1)}
        assert done(data).exit_code == 3
        assert done(data).exit_code == 3
        before = sum(judge.asked.values())
        assert before == 12
        judge.script = lambda *_: Reply()
        evaluation = done(data, retry_failed=True)
        assert (evaluation.exit_code, evaluation.requests) == (0, 12)
    assert evaluation.tables.lines["judge_overall"]["made"].own.n == 6


def test_missing_results_count_and_a_wrong_folder_is_told_at_once(tmp_path):
    data = imgedit(tmp_path)
    (tmp_path / "made" / "2.png").unlink()
    (tmp_path / "made" / "3.png").write_bytes(b"\x89PNG cut")
    evaluation = done(data)
    assert evaluation.tables.reasons["made"] == {"broken_result": 1, "missing_result": 1}
    assert "missing_result" in (tmp_path / "out" / "evaluate" / "table.md").read_text()
    empty = imgedit(tmp_path / "other")
    empty["results"] = {"made": str(tmp_path / "other" / "nowhere")}
    with pytest.raises(SourceError, match=r"results\.made"):
        done(empty)


def test_whatever_is_wrong_is_named_counted_and_excluded_and_the_run_goes_on(tmp_path):
    picture = encode_png(np.full((512, 512, 3), 90, dtype=np.uint8))
    entry = {"original_prompt": "a cat", "editing_prompt": "a [dog", "editing_type_id": "1", "mask": [600, 9]}
    entries = {name: entry | {"image_path": f"1_change/{name}.png"} for name in ("a", "b", "c", "d", "e", "f")}
    entries["b"] = entries["b"] | {"mask": [1, 2, 3]}
    for folder in ("pie/annotation_images", "made/annotation_images"):
        (tmp_path / folder / "1_change").mkdir(parents=True)
        for name in entries:
            (tmp_path / folder / "1_change" / f"{name}.png").write_bytes(picture)
    (tmp_path / "pie/annotation_images/1_change/c.png").unlink()
    (tmp_path / "made/annotation_images/1_change/d.png").unlink()
    small = encode_png(np.zeros((256, 256, 3), dtype=np.uint8))
    (tmp_path / "made/annotation_images/1_change/e.png").write_bytes(small)
    (tmp_path / "made/annotation_images/1_change/f.png").write_bytes(picture[:200])
    (tmp_path / "pie" / "mapping_file.json").write_text(json.dumps(entries))
    found = done(
        {
            "set": {"kind": "pie_bench", "folder": str(tmp_path / "pie")},
            "results": {"made": str(tmp_path / "made")},
            "metrics": {"clip": str(tmp_path / "nowhere")},
            "sink": {"folder": str(tmp_path / "out")},
            "statistics": {"resamples": 199},
        }
    )
    assert found.exit_code == 0
    reasons = {"bad_mask": 1, "broken_result": 1, "missing_image": 1, "missing_result": 1, "result_size": 1}
    assert found.tables.reasons == {"made": reasons}
    assert found.tables.notes == {"made": {"brackets_unbalanced": 4, "psnr_infinite": 1}}
    assert found.tables.lines["mse"]["made"].own.n == 1
    table = (tmp_path / "out" / "evaluate" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in (*reasons, "clip_sim_dir"))
    assert "no folder here" in table


def test_a_signal_ends_a_slow_judge_at_once_and_the_same_command_goes_on(tmp_path):
    with fake_judge(lambda digest, part, _: Reply(seconds=0 if part == "sc" else 300)) as judge:
        data = imgedit(tmp_path) | {"judge": judge_of(judge)}
        (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(data))
        command = [sys.executable, "-m", "pipeline.entry", "evaluate", str(tmp_path / "evaluation.yaml")]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and judge.in_flight < 2:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=30)
        assert child.returncode == 128 + signal.SIGTERM, said
        kept = len(list((tmp_path / "out" / "evaluate" / "journal").glob("*.json")))
        judge.script = lambda *_: Reply()
        assert done(data).requests == 12 - kept


def test_results_are_laid_out_as_the_official_scripts_read_them(tmp_path):
    data = drawn(tmp_path / "run", set=imgedit(tmp_path / "set")["set"])
    data["methods"] = {"strong": METHODS["strong"]}
    done(data)
    edited = tmp_path / "run" / "evaluate" / "edited"
    assert sorted(path.name for path in (edited / "strong").glob("*.png")) == [f"{number}.png" for number in range(6)]
    again = {
        "set": data["set"],
        "results": {"strong": str(edited / "strong")},
        "sink": {"folder": str(tmp_path / "again")},
        "statistics": data["statistics"],
    }
    done(again)
    first, second = ({row["item"]: row["mse"] for row in rows_of(tmp_path / name)} for name in ("run", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"results": {"x": "y"}}, "either methods"),
        ({"methods": {}}, "either methods"),
        ({"methods": {}, "results": {"x": "y"}}, "no layout of results"),
        ({"edits": {"a": {"target_prompt": "x"}}}, "brings its own edits"),
        ({"sink": {"folder": "x", "format": "webdataset"}}, "reads its edits back"),
        ({"judge": {"model": "m", "protocol": "imgedit"}}, "types of ImgEdit"),
        ({"set": {"kind": "pie_bensch", "folder": "x"}}, "pie_bench"),
        ({"metrics": {"clipp": "x"}}, "clipp"),
        (
            {"methods": {"x": {"inversion": {"method": "ddim"}, "editing": {"method": "ledits_pp"}}}},
            "cannot work with",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_way_out(tmp_path, change, words):
    with pytest.raises(RecipeError, match=words):
        evaluation_from(drawn(tmp_path) | change)


@pytest.mark.parametrize("name", ["scipy", "json_repair", "httpx2"])
def test_without_its_extra_an_evaluation_says_how_to_get_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match=rf"needs {name}.*pip install 'shardedit\[evaluate\]'"):
        evaluation_from(drawn(tmp_path))


def test_the_command_prints_the_table_and_counts_without_doing(tmp_path):
    config = tmp_path / "evaluation.yaml"
    config.write_text(yaml.safe_dump(drawn(tmp_path / "out")))
    counted = CliRunner().invoke(app, ["evaluate", str(config), "--plan", "set.count=3"])
    assert counted.exit_code == 0, counted.output
    assert re.search(r"results +6\n", counted.output)
    assert not (tmp_path / "out").exists()
    shown = CliRunner().invoke(app, ["evaluate", str(config), "set.count=3"])
    assert shown.exit_code == 0, shown.output
    assert "Drawn world, n = 3" in shown.output
    assert "Measured 1 unit (1 now)" in shown.output


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "evaluate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_evaluation_can_work_and_opens_with_what_it_makes(path):
    assert isinstance(load_evaluation(path), EvaluateConfig)
    assert f"shardedit evaluate configs/evaluate/{path.name}" in path.read_text()
