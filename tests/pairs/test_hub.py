"""An export on a hub: everything in one commit or nothing, and never over somebody else's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import RecipeError, SinkError
from pipeline.pairs.export import Export, ExportConfig, export
from pipeline.pairs.hub import Push
from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.dataset_hub import TOKEN, DatasetHub, dataset_hub
from tests.runs import recipe_data, write_shards

NAME = "somebody/pairs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed")
    write_shards(folder / "in", shards=1, rows=4, damaged=())
    data = recipe_data(folder / "in", folder / "out", sink={"include_input": True}, engine="local")
    assert driver.run(recipe_from(data), progress="off").complete
    return folder / "out"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with dataset_hub(NAME, monkeypatch) as served:
        yield served


def pushed(run: Path, out: Path, **settings: object) -> Export:
    push = Push(repository=NAME, private=bool(settings.pop("private", False)))
    config = {"runs": (str(run),), "out": str(out), "preset": "instructpix2pix", "validation": 0.3, "push": push}
    return export(ExportConfig(**config | settings))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_goes_up_in_one_commit_with_all_of_its_files(run, hub, tmp_path):
    result = pushed(run, tmp_path / "set", private=True)
    assert result.pushed is not None
    assert result.pushed.endswith(f"/datasets/{NAME}/commit/{1:040d}")
    assert (hub.commits, hub.private) == (1, True)
    assert hub.files == files_of(tmp_path / "set") | {".gitattributes": b""}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in hub.files.values())


@pytest.mark.parametrize("step", ["upload", "commit"])
def test_a_push_that_fails_leaves_nothing_and_the_same_command_pushes_again(run, hub, tmp_path, step):
    hub.refuses = step
    with pytest.raises(SinkError, match=f"{NAME} cannot be pushed to.*the same command tries again") as failed:
        pushed(run, tmp_path / "set")
    assert TOKEN not in str(failed.value)
    assert hub.files == {".gitattributes": b""}
    hub.refuses = ""
    result = pushed(run, tmp_path / "set")
    assert result.written == 0
    assert hub.files == files_of(tmp_path / "set") | {".gitattributes": b""}


def test_a_repository_of_something_else_is_refused_before_anything_is_written(run, hub, tmp_path):
    hub.files = {".gitattributes": b"", "README.md": b"", "train.csv": b"a,b"}
    with pytest.raises(SinkError, match=r"holds something else: train\.csv"):
        pushed(run, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    hub.files = None
    pushed(run, tmp_path / "set")
    pushed(run, tmp_path / "set")  # the same once more is no other
    with pytest.raises(SinkError, match="holds something else: data/"):
        pushed(run, tmp_path / "other", preset="magicbrush")
    assert not (tmp_path / "other").exists()


def test_somebody_elses_commit_in_the_meantime_is_not_built_upon(run, hub, tmp_path, monkeypatch):
    hub.files = {".gitattributes": b""}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: setattr(hub, "commits", 5))
    with pytest.raises(SinkError, match="cannot be pushed to"):
        pushed(run, tmp_path / "set")
    assert hub.files == {".gitattributes": b""}


def test_without_a_token_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(RecipeError, match=r"push_to: no token is set\. Set HF_TOKEN"):
        pushed(run, tmp_path / "set")
    assert not (tmp_path / "set").exists()
