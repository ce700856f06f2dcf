"""What names a run is taken alike by every command; a path that the system refuses is told as the user's, not ours."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from pipeline import cli
from tests.runs import recipe_data, write_shards


def shardedit(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A recipe, and the override with which it was run: the recipe alone names a folder where no run is."""
    root = tmp_path_factory.mktemp("a run")  # a blank in the path: what is printed must be quoted
    source = write_shards(root / "in", shards=1, rows=2, damaged=())
    config = root / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe_data(source, root / "elsewhere", engine="local")), encoding="utf-8")
    override = f"sink.folder={root / 'out'}"
    assert shardedit("edit", config, override).exit_code == 0
    return config, override


@pytest.mark.parametrize(
    ("command", "more"), [("status", ()), ("verify", ()), ("report", ()), ("regenerate", ("s0.tar/im00",))]
)
def test_a_command_on_a_run_takes_its_folder_and_what_edit_takes(
    made: tuple[Path, str], command: str, more: tuple[str, ...]
) -> None:
    config, override = made
    edits = ("--edit", "a") if command == "regenerate" else ()
    for named in ([config.parent / "out", *more], [config, *more, override]):
        told = shardedit(command, *named, *edits)
        assert told.exit_code == 0, told.output
    alone = shardedit(command, config, *more, *edits)
    assert (alone.exit_code, "elsewhere holds no run" in alone.stderr) == (1, True)
    folder = shardedit(command, config.parent / "out", *more, override, *edits)
    assert (folder.exit_code, "Give the recipe" in folder.stderr) == (2, True)
    secret = shardedit(command, config.parent / "out", *more, "sink.storage_options.secret=hunter2", *edits)
    assert (secret.exit_code, "hunter2" in secret.output) == (2, False)
    missing = shardedit(command, "missing.yaml", *more)
    assert (missing.exit_code, "cannot be read" in missing.stderr) == (2, True)


def test_the_command_that_a_command_names_is_the_whole_one(made: tuple[Path, str]) -> None:
    config, override = made
    whole = f"shardedit edit '{config}' '{override}'"
    assert whole in shardedit("plan", config, override, "--no-probe").stdout
    secret = shardedit("plan", config, override, "sink.storage_options={token: hunter2}", "--no-probe").stdout
    assert (f"{override}' sink.storage_options=..." in secret, "hunter2" in secret) == (True, False)
    (stray := config.parent / "out" / "data" / "copy.parquet").write_bytes(b"")
    said = shardedit("verify", config, override).stdout
    stray.unlink()
    assert said.strip().splitlines()[-1] == f"To repair: shardedit verify '{config}' '{override}' --repair; {whole}"


@pytest.mark.parametrize("place", ["a file", "below a file", "a long name"])
@pytest.mark.parametrize("command", ["edit", "demo", "status"])
def test_a_path_that_cannot_be_written_is_the_users(
    made: tuple[Path, str], tmp_path: Path, command: str, place: str
) -> None:
    (tmp_path / "file").write_text("")
    path = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "a long name": tmp_path / ("x" * 300)}
    arguments = {
        "edit": (made[0], f"sink.folder={path[place]}"),
        "demo": ("--output", path[place], "--images", 1),
        "status": (path["below a file" if place == "a file" else place],),
    }
    told = shardedit(command, *arguments[command])
    assert told.exit_code == 1, told.output
    assert told.stderr.startswith("SinkError: ")
    assert str(tmp_path) in told.stderr
    assert "fault of shardedit" not in told.stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: access is refused. Check the path"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "/data/x: the disk is read-only. Check"),
        (OSError(errno.ENOSPC, "No space left on device"), r"which may be .*: no space is left\."),
    ],
)
def test_what_the_system_refuses_anywhere_is_the_users(
    made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, text: str
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.running.driver.run", refused)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = shardedit("edit", made[0])
    assert told.exit_code == 1
    assert re.search(text, told.stderr)
    assert "fault of shardedit" not in told.stderr
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # not even the traceback can be written
    assert "--debug" in shardedit("edit", made[0]).stderr
