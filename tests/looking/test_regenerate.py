"""`shardedit regenerate`: one stored result is made again and compared, byte by byte."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline import cli
from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.runs import recipe_data, write_shards

pytestmark = pytest.mark.timeout(120)


def shardedit(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(params=["parquet", "webdataset"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = write_shards(tmp_path / "in", shards=2, rows=3, damaged=(4,))
    data = recipe_data(source, tmp_path / "out", sink={"format": request.param}, engine="local")
    driver.run(recipe_from(data), progress="off")
    return tmp_path / "out"


def test_a_result_comes_out_with_the_same_bytes(run: Path) -> None:
    for key in ("s1.tar/im05", "im05"):
        made = shardedit("regenerate", run, key, "--edit", "a")
        assert made.exit_code == 0, made.output
        assert "s1.tar/im05, a, ledits_pp in data/train-00000-of-00001" in made.stdout
        assert re.search(r"read: row 2 of .*/in/s1.tar, [0-9,]+ bytes of image", made.stdout), made.stdout
        assert re.search(r"edited: a by ledits_pp, seed \d+, call size 4, on cpu, \d+ thread", made.stdout)
        assert re.search(r"compared: (\d+) of \1 (columns|members) equal, .*2,240 of 2,240 pixels", made.stdout)
        assert "equal in every byte" in made.stdout
        assert "changed since" not in made.stdout


def test_a_key_that_names_several_results_or_none_or_a_failed_one_is_an_error(run: Path) -> None:
    several = shardedit("regenerate", run, "im05")
    assert several.exit_code == 1
    assert "s1.tar/im05 --edit b --method ledits_pp" in several.stderr
    assert "no result 'im99'" in shardedit("regenerate", run, "im99").stderr
    assert "failed in stage decode: DecodeError" in shardedit("regenerate", run, "im04").stderr


def test_a_source_that_has_changed_is_named_and_so_is_what_comes_out_of_it(run: Path) -> None:
    write_shards(run.parent / "other", shards=1, rows=9, damaged=())
    other = run.parent / "other" / "s0.tar"
    (run.parent / "in" / "s0.tar").write_bytes(other.read_bytes().replace(b"a caption", b"A Caption"))
    made = shardedit("regenerate", run, "im01", "--edit", "a")
    assert made.exit_code == 1
    assert "changed since: source: s0.tar is another version than was edited" in made.stdout
    assert "differs: caption" in made.stdout or "differs: json" in made.stdout


def test_a_row_that_left_the_source_is_an_error(run: Path) -> None:
    write_shards(run.parent / "other", shards=1, rows=1)
    for shard in (run.parent / "other" / "s0.tar", run.parent / "in" / "s1.tar"):  # fewer rows; others in their places
        (run.parent / "in" / "s0.tar").write_bytes(shard.read_bytes())
        made = shardedit("regenerate", run, "im01", "--edit", "a")
        assert made.exit_code == 1
        assert "s0.tar/im01 is no longer in the source" in made.stderr


def test_other_pixels_are_told_with_their_psnr_and_another_model_by_its_digest(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", shards=1, rows=2)
    data = recipe_data(source, tmp_path / "out", sink={"shard_size": 0}, engine="local")
    driver.run(recipe_from(data), progress="off")
    (file,) = (tmp_path / "out" / "data").iterdir()
    table = pq.read_table(file)
    stored = table.to_pylist()
    stored[0]["image"]["bytes"] = brighter(stored[0]["image"]["bytes"])
    pq.write_table(pa.Table.from_pylist(stored, schema=table.schema), file)
    for path, change in {
        next((tmp_path / "out" / "_units").rglob("*.json")): lambda text: _with_size(text, file),
        tmp_path / "out" / "run.json": lambda text: text.replace('"digest": "', '"digest": "other-'),
    }.items():
        path.write_text(change(path.read_text()))
    made = shardedit("regenerate", tmp_path / "out", "im00", "--edit", stored[0]["edit"])
    assert made.exit_code == 1
    assert "changed since: model: digest was other-" in made.stdout
    assert "differs: image: PSNR 48.1 dB, 100.00% of the pixels differ" in made.stdout
    assert "differs: mask" not in made.stdout
    assert re.search(r"compared: \d+ of \d+ columns equal, image 0 of 2,240 pixels, mask 2,240 of 2,240", made.stdout)


def brighter(data: bytes) -> bytes:
    """Every value moved by one level: 48.1 dB, by the definition of PSNR."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).point(lambda value: value + 1 if value < 255 else 254).save(buffer, "PNG")
    return buffer.getvalue()


def _with_size(text: str, file: Path) -> str:
    manifest: dict[str, Any] = json.loads(text)
    manifest["files"][0]["size"] = file.stat().st_size
    return json.dumps(manifest)
