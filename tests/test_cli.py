"""The command line: quick help, errors in a few lines, exit codes, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline import cli, compat
from pipeline.common import stopping
from pipeline.editing import EDITORS
from pipeline.inversion import INVERSIONS
from pipeline.looking.ending import BROKEN_PIPE
from pipeline.models.demo.shards import write_demo_shards
from pipeline.running import demo


def shardedit(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A recipe over six small faces, on the closed-form model, in this process."""
    write_demo_shards(tmp_path / "in", 6, size=64)
    recipe = {
        "source": {"shards": str(tmp_path / "in" / "*.tar")},
        "edits": {"concepts": [{"prompt": "a hat"}]},
        "model": {"name": "analytic"},
        "inversion": {"method": "ddpm", "num_steps": 4},
        "sink": {"folder": str(tmp_path / "out")},
        "run": {"engine": "local", "unit_size": 4, "call_size": 8},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_help_loads_neither_torch_nor_ray():
    done = python(
        "import sys; from pipeline.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'diffusers', 'pydantic'} & set(sys.modules), 'slow imports'"
    )
    assert done.returncode == 0, done.stderr
    commands = (
        "edit",
        "evaluate",
        "plan",
        "status",
        "verify",
        "regenerate",
        "audit",
        "export",
        "report",
        "demo",
        "schema",
        "methods",
    )
    for command in commands:
        assert re.search(rf"\b{command}\b", done.stdout)


def test_a_recipe_that_cannot_work_ends_before_ray_is_loaded(config):
    done = python(
        "import sys; from pipeline.cli import main\n"
        f"try: main(['edit', {str(config)!r}, 'run.sed=1', 'inversion.num_steps=0'])\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'ray' not in sys.modules\n"
        "sys.exit(code)"
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[0] == f"RecipeError: {config} has 2 problem(s):"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"run.sed", "inversion.num_steps"}
    assert not (config.parent / "out").exists()


def test_the_version_is_the_packages():
    assert shardedit("--version").output == "shardedit 0.1.0\n"


def test_edit_edits_and_says_where_things_are(config):
    done = shardedit("edit", config)
    assert done.exit_code == 0, done.output
    assert "6 of 6 results from 6 images" in done.stdout
    assert "no GPU" in done.stderr
    out = config.parent / "out"
    assert f"{out}/report.html" in done.stdout
    assert (out / "report.html").stat().st_size > 10_000
    assert json.loads((out / "summary.json").read_text())["done"] == 6
    assert [path.name[:20] for path in (out / "data").iterdir()] == ["train-00000-of-00001"]


def test_edit_again_finds_everything_done(config):
    assert shardedit("edit", config).exit_code == 0
    again = shardedit("edit", config)
    assert again.exit_code == 0
    assert "(0 now)" in again.stdout


def test_a_spent_error_budget_ends_with_1_and_says_which(config):
    done = shardedit("edit", config, "source.max_pixels=100", "run.max_consecutive_failed_units=1")
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1].startswith("RunAborted: 1 units in a row have no result at all")
    assert json.loads((config.parent / "out" / "summary.json").read_text())["exit_code"] == 1


def test_status_of_a_stopped_run_tells_what_is_done_and_how_to_go_on(config):
    shardedit("edit", config, "source.max_pixels=100", "run.max_consecutive_failed_units=1")
    for where in (config, config.parent / "out"):
        told = shardedit("status", where)
        assert told.exit_code == 0, told.output
        assert "0 of an unknown number of results, from 4 images" in told.stdout
        assert re.search(r"by stage +│ decode 4", told.stdout)
        assert "4 failed in faces-00000.tar, the first of them in _parts/quarantine/faces-00000" in told.stdout
        assert "faces-00000.tar/face-000000, edit, ledits_pp: decode: DecodeError: " in told.stdout
        assert "1 unit, 0 of 1 shard" in told.stdout
    assert f"shardedit edit {config}" in shardedit("status", config).stdout


def test_status_of_a_finished_run_agrees_with_its_summary(config):
    shardedit("edit", config)
    told = json.loads(shardedit("status", config, "--json").stdout)
    summary = json.loads((config.parent / "out" / "summary.json").read_text())
    assert told["so_far"] | {"units_now": 2, "generation": 1} == summary
    assert (told["planned"], told["planned_is_estimate"], told["shards_done"]) == (6, False, 1)
    assert told["failures"] == told["worst_shards"] == []


def test_status_estimates_what_is_planned_from_the_shards_that_are_done(tmp_path, config):
    source = tmp_path / "in" / "faces-00000.tar"
    (tmp_path / "in" / "more.tar").write_bytes(source.read_bytes())
    shardedit("edit", config)
    next((tmp_path / "out" / "_units").glob("more-*/00001-*.json")).unlink()
    told = json.loads(shardedit("status", config, "--json").stdout)
    assert (told["so_far"]["done"], told["planned"], told["planned_is_estimate"]) == (10, 12, True)
    assert (told["shards"], told["shards_done"]) == (2, 1)


def test_edit_can_be_asked_to_retry_what_failed(config):
    assert shardedit("edit", config, "source.max_pixels=100", "run.max_failed_fraction=1").exit_code == 0
    again = shardedit("edit", config, "source.max_pixels=100", "run.max_failed_fraction=1", "--retry-failed")
    assert again.exit_code == 0
    assert "(2 now)" in again.stdout


def test_a_run_within_its_error_budget_succeeds_and_says_what_failed(config):
    done = shardedit("edit", config, "source.max_pixels=100", "run.max_failed_fraction=1")
    assert done.exit_code == 0, done.output
    assert re.search(r"failed +6 of 6, within the error budget \(run\.max_failed_fraction 1\)", done.stdout)
    written = json.loads((config.parent / "out" / "summary.json").read_text())
    assert (written["failed"], written["outcome"], written["exit_code"]) == (6, "complete with failures", 0)
    assert re.search(r"by stage +decode 6", done.stdout)
    assert re.search(r"by reason +DecodeError 6", done.stdout)
    assert "out/quarantine" in done.stdout


def test_strict_ends_with_3_where_anything_failed_and_with_0_where_nothing_did(config):
    assert shardedit("edit", config, "--strict").exit_code == 0
    failing = ("source.max_pixels=100", "run.max_failed_fraction=1", f"sink.folder={config.parent / 'strict'}")
    done = shardedit("edit", config, *failing, "--strict")
    assert done.exit_code == 3
    assert json.loads((config.parent / "strict" / "summary.json").read_text())["exit_code"] == 3
    assert shardedit("edit", config, *failing).exit_code == 0


def test_too_many_failures_in_too_few_units_to_be_judged_on_the_way_are_judged_in_the_end(config):
    for strict in ([], ["--strict"]):
        done = shardedit("edit", config, "source.max_pixels=100", *strict)
        assert done.exit_code == 1, done.output
        assert (
            done.stderr.strip()
            .splitlines()[-1]
            .startswith("RunAborted: 6 of 6 results failed, more than run.max_failed_fraction 0.5")
        )
    written = json.loads((config.parent / "out" / "summary.json").read_text())
    assert (written["complete"], written["outcome"], written["exit_code"]) == (True, "over the error budget", 1)
    assert (config.parent / "out" / "report.html").exists()
    assert shardedit("edit", config, "source.max_pixels=100", "run.max_failed_fraction=1").exit_code == 0


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["source.shards=/nowhere/at/all/*.tar"], "SourceError"),
        (["model.name=/nowhere/at/all"], "ModelError"),
        (["run.gpus_per_worker=64"], "ClusterError"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error_and_nothing_written(config, overrides, kind):
    done = shardedit("edit", config, *overrides)
    assert done.exit_code == 1
    assert kind in done.stderr
    assert "Traceback" not in done.output
    assert len(done.stderr.strip().splitlines()) < 10
    assert not (config.parent / "out").exists()


def test_a_fault_of_ours_names_itself_and_keeps_its_traceback(config, monkeypatch, tmp_path):
    def broken(_, **__):
        raise RuntimeError("boom [bold]\nand much more")

    monkeypatch.setattr("pipeline.running.driver.run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = shardedit("edit", config)
    assert done.exit_code == 1
    assert "RuntimeError: boom [bold]\n" in done.stderr
    assert "Traceback" not in done.stderr
    (log,) = re.findall(r"traceback is in (\S+\.log)", done.stderr)
    assert "and much more" in Path(log).read_text(encoding="utf-8")
    shown = shardedit("edit", config, "--debug")
    assert "Traceback" in shown.stderr


def test_a_stop_is_one_line_and_an_exit_code(config, monkeypatch):
    def stopped(_, **__):
        raise stopping.Stopped(signal.SIGTERM)

    monkeypatch.setattr("pipeline.running.driver.run", stopped)
    done = shardedit("edit", config)
    assert done.exit_code == 143
    (line,) = done.stderr.splitlines()
    assert line.startswith("Stopped by SIGTERM.")


def test_plan_prints_numbers_and_writes_nothing(config):
    done = shardedit("plan", config)
    assert done.exit_code == 0, done.output
    for line in (
        r"images +6 in 1 shard",
        r"results +6",
        r"network rows +72, 12.0 per image",
        r"time +about .* \(cpu\)",
    ):
        assert re.search(line, done.stdout), line
    assert f"shardedit edit {config}" in done.stdout
    assert not (config.parent / "out").exists()


def test_plan_speaks_json(config):
    done = shardedit("plan", config, "--json", "--no-probe")
    assert json.loads(done.stdout)["network_rows"] == 72


def test_report_is_written_again(config):
    shardedit("edit", config)
    page = config.parent / "out" / "report.html"
    before = page.read_bytes()
    page.unlink()
    done = shardedit("report", config.parent / "out")
    assert done.stdout.strip() == str(page)
    assert page.read_bytes() == before
    assert shardedit("report", config.parent).exit_code == 1


def test_schema_is_a_json_schema_of_the_recipe(config):
    schema = json.loads(shardedit("schema").stdout)
    recipe = yaml.safe_load(config.read_text())
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError, match="wrokers"):
        jsonschema.validate(recipe | {"run": {"wrokers": 2}}, schema)


def test_schema_as_markdown_is_what_the_recipes_page_ends_with():
    page = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page.endswith(f"-->\n\n{shardedit('schema', '--markdown').stdout.rstrip()}\n")


def test_methods_lists_every_one_with_its_settings():
    text = shardedit("methods").stdout
    for registry in (INVERSIONS, EDITORS):
        for name, method in registry.items():
            assert name in text
            for setting in method.model_fields:
                left_out = setting == "method" or any(setting in settings for settings in compat.SETTINGS.values())
                assert bool(re.search(rf"\b{setting}:", text)) != left_out


@pytest.fixture
def small_demo(monkeypatch):
    """The demonstration on the closed-form model and in one process: quick, and the same way through the code."""
    settings = demo.SETTINGS | {
        "model": {"name": "analytic"},
        "inversion": {"method": "ddpm", "num_steps": 4},
        "run": demo.SETTINGS["run"] | {"engine": "local"},
    }
    monkeypatch.setattr(demo, "SETTINGS", settings)


@pytest.mark.usefixtures("small_demo")
def test_the_demo_draws_edits_and_reports(tmp_path):
    out = tmp_path / "demo"
    done = shardedit("demo", "--output", out, "--images", 8)
    assert done.exit_code == 0, done.output
    assert str(out / "report.html") in done.stdout
    assert sorted(path.name for path in (out / "input").iterdir()) == ["faces-00000.tar"]
    assert list((out / "data").glob("*.parquet"))
    summary = json.loads((out / "summary.json").read_text())
    assert {"planned", "done", "failed", "images_per_second"} <= set(summary)
    assert (summary["planned"], summary["failed"]) == (6 * 2 + 2, 0)
    assert (out / "report.html").stat().st_size > 10_000
    overview = Image.open(out / "overview.png")
    assert overview.width > overview.height > 300


@pytest.mark.usefixtures("small_demo")
def test_a_finished_demo_has_nothing_left_to_do(tmp_path):
    out = tmp_path / "demo"
    assert shardedit("demo", "--output", out, "--images", 4).exit_code == 0
    parts = {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    again = shardedit("demo", "--output", out, "--images", 4)
    assert again.exit_code == 0, again.output
    assert "Nothing left to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()} == parts
    other = shardedit("demo", "--output", out, "--images", 5)
    assert other.exit_code == 1
    assert "--images 4" in other.stderr


@pytest.mark.parametrize("job", ["plan", "status", "verify", "regenerate", "audit", "export", "report", "demo"])
def test_a_job_is_the_command_of_its_name(job):
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--help"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f" {job} [OPTIONS]" in done.stdout


ENDS = {"stdout closed": "1>&-", "stderr closed": "2>&-", "all closed": "0<&- 1>&- 2>&-", "nobody reads": "| true"}


@pytest.mark.parametrize("end", ENDS)
def test_a_command_whose_output_nobody_takes_ends_without_a_fault(config: Path, end: str) -> None:
    shardedit("edit", config)
    command = f"{sys.executable} -m pipeline.cli status {config.parent}/out; echo $? >{config.parent}/code"
    text = f"( {command} ) {ENDS[end]}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, timeout=120)
    assert int((config.parent / "code").read_text()) == (BROKEN_PIPE if end == "nobody reads" else 0)
    assert "fault of shardedit" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_file_that_is_opened_while_a_stream_is_closed_is_not_written_to_as_that_stream(tmp_path: Path) -> None:
    code = (
        "from pipeline.looking.printing import whole_streams; whole_streams(); "
        f"print(open({str(tmp_path / 'x')!r}, 'w').fileno())"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" 0<&- 2>&-'],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert int(done.stdout) > 2


def test_letters_that_a_terminal_lacks_are_shown_as_escapes(config: Path) -> None:
    name = config.parent / "r\u00e9cit-\u96ea.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "plan", str(name)],
        capture_output=True,
        check=False,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "latin-1", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert done.returncode == 2
    assert b"r\xe9cit-\\u96ea.yaml" in done.stderr


def test_a_working_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"cd {tmp_path}; rmdir {tmp_path}; {sys.executable} -m pipeline.cli status /nowhere"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    tmp_path.mkdir()
    assert done.returncode == 1
    assert done.stderr == (
        "The folder that this process works in is gone. Change to another one, and give the command again\n"
    )
