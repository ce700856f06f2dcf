"""Storage that fails: what is committed stays valid, the rerun completes, and the bytes are those of a calm run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import cluster
from pipeline.errors import ShardeditError, SinkError
from pipeline.evaluation.report import write_report
from pipeline.evaluation.results import RunFolder
from pipeline.reading import storage
from pipeline.recipe import Recipe, recipe_from
from pipeline.writing import commit as commit_module
from pipeline.writing.commit import committed_units
from tests.faulty import faulty_proxy
from tests.runs import asked, contents, recipe_data, results, write_shards

pytestmark = pytest.mark.timeout(300)  # botocore waits long between its attempts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("faults") / "in", shards=2, rows=4)


@pytest.fixture(scope="module")
def calm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("calm")
    cluster.run(recipe_from(recipe_data(source, out, engine="local")), progress="off")
    return contents(out)


@pytest.mark.parametrize("at", ["/data/", "/_units/", "/_attempts/"])
def test_a_full_disk_ends_the_run_and_the_rerun_with_room_completes_it(
    source: Path, calm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    put: Callable[[Path, bytes], None] = commit_module._put_local
    recipe = recipe_from(recipe_data(source, tmp_path / "out", engine="local"))
    written: list[str] = []

    def full(path: Path, data: bytes) -> None:
        if at in str(path):
            if len(written) == 2:
                raise OSError(28, "No space left on device")
            written.append(path.name)
        put(path, data)

    monkeypatch.setattr(commit_module, "_put_local", full)
    with pytest.raises(SinkError, match="No space left"):
        cluster.run(recipe, progress="off")
    assert 1 <= len(list(committed_units(recipe.sink))) <= 3
    monkeypatch.undo()
    assert cluster.run(recipe, progress="off").complete
    assert contents(tmp_path / "out") == calm
    assert results(tmp_path / "out") == asked(shards=2, rows=4)


def on_s3(server: Any, folder: str, **options: Any) -> Recipe:
    data = recipe_data("s3://faults-in", f"s3://faults-out/{folder}", engine="local")
    data["source"]["storage_options"] = data["sink"]["storage_options"] = {**server.storage_options, **options}
    return recipe_from(data)


def test_refused_requests_and_cut_bodies_change_no_byte(
    source: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    for shard in source.iterdir():
        (s3_server.bucket("faults-in") / shard.name).write_bytes(shard.read_bytes())
    out = s3_server.bucket("faults-out")
    cluster.run(on_s3(s3_server, "calm"), progress="off")
    with faulty_proxy(s3_server.endpoint, refuse=0.2, cut=0.5) as (endpoint, counts):
        recipe = on_s3(s3_server, "run", client_kwargs={"endpoint_url": endpoint})
        for _ in range(10):  # a body that is cut five times in a row ends a run; the same command goes on
            with contextlib.suppress(ShardeditError):
                if cluster.run(recipe, progress="off").complete:
                    break
        assert counts["refused"] > 10
        assert counts["cut"] > 5
    assert contents(out / "run") == contents(out / "calm")
    assert results(out / "run") == asked(shards=2, rows=4)


def test_a_report_is_written_from_a_store_that_refuses_requests_and_cuts_bodies(
    source: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(storage, "ATTEMPTS", 12)  # with such a share of faults five would now and then not do
    for shard in source.iterdir():
        (s3_server.bucket("faults-in") / shard.name).write_bytes(shard.read_bytes())
    out = s3_server.bucket("faults-out") / "reported"
    cluster.run(on_s3(s3_server, "reported"), progress="off")
    wanted = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    with faulty_proxy(s3_server.endpoint, refuse=0.2, cut=0.3) as (endpoint, counts):
        write_report(on_s3(s3_server, "reported", client_kwargs={"endpoint_url": endpoint}).sink)
        assert min(counts["refused"], counts["cut"]) > 1
    assert (out / "report.html").read_bytes() == wanted


def test_a_store_that_answers_no_more_is_an_error_that_names_the_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_from(recipe_data(source, tmp_path / "out", engine="local"))
    cluster.run(recipe, progress="off")
    opened: list[str] = []

    def broken(self: Any, path: str, *_: Any, **__: Any) -> Any:
        opened.append(path)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)
    folder = RunFolder(recipe.sink)
    monkeypatch.setattr(LocalFileSystem, "open", broken)
    with pytest.raises(SinkError, match=r"part-s\d.*\.parquet cannot be read: OSError: .*Input/output error"):
        folder.figures([min((tmp_path / "out" / "data").iterdir()).relative_to(tmp_path / "out").as_posix()])
    assert len(opened) == storage.ATTEMPTS


def test_a_wrong_secret_is_a_short_error_and_nothing_is_written(s3_server: Any) -> None:
    s3_server.bucket("faults-out")
    recipe = on_s3(s3_server, "denied", secret="wrong-secret")
    with pytest.raises(ShardeditError, match=r"(?i)denied|refused|forbidden|signature") as caught:
        cluster.run(recipe, progress="off")
    assert "wrong-secret" not in str(caught.value)
    assert not (s3_server.bucket("faults-out") / "denied").exists()
