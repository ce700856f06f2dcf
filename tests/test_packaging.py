"""What pip installs: a front door that needs no extra, and declared dependencies that are those in use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools import Distribution
from typer.testing import CliRunner

from pipeline.cli import app

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WITH_RAY = set((ROOT / "pipeline" / "running" / "on_ray").glob("*.py"))
SIGNING = ROOT / "pipeline" / "pairs" / "signing.py"  # with the extra c2pa
COMES_ALONG = {"tokenizers"}  # with transformers
ON_OUR_BEHALF = {"accelerate"}  # diffusers imports it, where blocks of a network move (pipeline/models/offload.py)
EVALUATION = ROOT / "pipeline" / "evaluation"
OF_ONES_OWN = {"torchmetrics"}  # measures LPIPS where it is there, with torchvision; else these are unavailable

WITHOUT_EXTRAS = """
import importlib.metadata
import sys

EXTRAS = ("ray", "s3fs", "aiobotocore", "botocore")
for name in EXTRAS:
    sys.modules[name] = None  # any import of these fails from here on
installed = importlib.metadata.Distribution.from_name

def found(name):
    if name in EXTRAS:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

importlib.metadata.Distribution.from_name = found

import io
from pathlib import Path
from PIL import Image
from pipeline import Editor, run
from pipeline.running.demo import demo_recipe, draw_input, run_demo
from pipeline.errors import ClusterError, SourceError
from pipeline.reading.storage import open_fs

folder = Path(sys.argv[1])
draw_input(folder, 1)
concept = {"prompt": "sunglasses", "threshold": 0.85}
result = Editor.load("demo").edit(folder / "face.png", [concept], inversion={"method": "ddpm", "num_steps": 2})
assert result.image.size == (128, 128)
try:
    run(demo_recipe(folder), progress="off")
except ClusterError as error:
    print(error)
try:
    open_fs("s3://bucket/key", {})
except SourceError as error:
    print(error)
print(run_demo(folder, 1).done, "done")
"""


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower() for requirement in requirements}  # type: ignore[index]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_without_extras_an_image_is_edited_and_a_run_works_in_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    refused, unopened, made = done.stdout.splitlines()
    assert "pip install 'shardedit[s3]'" in unopened
    assert "pip install 'shardedit[cluster]'" in refused
    assert "run.engine=local" in refused
    assert made == "2 done"
    assert "the demo model knows drawn faces only" in done.stderr


def test_what_the_package_imports_is_what_it_depends_on() -> None:
    owners = packages_distributions()
    files = [
        path
        for folder in ("pipeline", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if path not in {*WITH_RAY, SIGNING}
    ]
    ours = set(sys.stdlib_module_names) | {"pipeline", "jobs"} | COMES_ALONG

    def wanted(paths: list[Path]) -> set[str]:
        used = set().union(*map(imported, paths)) - ours
        return {owner.lower().replace("_", "-") for name in used for owner in owners[name]}

    # Servers that edit are asked by the judges' client, which is imported where one is named.
    client = ROOT / "pipeline" / "remote" / "client.py"
    evaluating = [path for path in files if path.is_relative_to(EVALUATION) or path == client]
    needed = wanted([path for path in files if path not in evaluating])
    assert needed | ON_OUR_BEHALF == names(PROJECT["dependencies"])
    assert wanted(evaluating) - needed - OF_ONES_OWN == names(PROJECT["optional-dependencies"]["evaluate"])


IMPORT = """
import logging, os, sys, warnings
import numpy, PIL.ImageFile, torch  # what these do to a process is theirs

def state():
    return {
        "truncated": PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "handlers": list(logging.root.handlers),
        "level": logging.root.level,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "generator": torch.random.get_rng_state().tolist(),
        "errors": numpy.geterr(),
        "hook": (sys.excepthook, sys.displayhook),
    }

PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True  # somebody else's choice
before = state()
import pipeline
assert not {"ray", "diffusers", "transformers", "pyarrow"} & set(sys.modules), "slow imports"
from pipeline import Concept, Editor, EditRequest, Recipe, load_recipe, run
assert not {"ray", "diffusers", "transformers"} & set(sys.modules), "slow imports"
print([name for name, value in state().items() if value != before[name]])
"""


def test_an_import_changes_nothing_of_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False, timeout=100)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_wheel_holds_weights_templates_recipes_and_the_mark_of_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    inside = {Path(path).relative_to(build.build_lib).as_posix() for path in build.get_outputs()}
    recipes = {f"pipeline/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    models = [ROOT / "pipeline" / "models" / "demo" / name for name in ("weights", "flow_weights")]
    parts = {path.relative_to(ROOT).as_posix() for one in models for path in one.rglob("*") if path.is_file()}
    assert len(recipes) > 10
    assert len(parts) > 10
    assert recipes | parts | {"pipeline/py.typed", "pipeline/looking/report/page.html.j2", "jobs/edit.py"} <= inside
    assert not [path for path in inside if path.startswith(("tests", "benchmarks"))]


def test_every_shipped_recipe_can_be_listed_and_printed() -> None:
    listed = CliRunner().invoke(app, ["config"])
    assert listed.exit_code == 0
    lines = dict(line.split(": ", 1) for line in listed.stdout.splitlines())
    there = {path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path for path in CONFIGS}
    assert set(lines) == set(there)
    assert all(10 < len(about) < 200 for about in lines.values())
    for name, path in there.items():
        for spelling in (name, f"configs/{name}.yaml"):
            assert CliRunner().invoke(app, ["config", spelling]).stdout == path.read_text(encoding="utf-8")
    unknown = CliRunner().invoke(app, ["config", "../pyproject"])
    assert unknown.exit_code == 2
    assert "demo_edits/add_hat" in unknown.stderr
