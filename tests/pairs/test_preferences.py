"""Pairs of better and worse: of attempts, of two runs, of what gates rejected; as trainers of preferences read them."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import RecipeError, SinkError
from pipeline.pairs.export import ExportConfig, export
from pipeline.pairs.preferences import Candidate, Score, pairs_among, score_of
from pipeline.pairs.results import Place
from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.pairs.gated import rewritten
from tests.runs import recipe_data, write_shards

datasets = pytest.importorskip("datasets")
NONE_BELOW = "none scores below the best"
SCORE = {"attempt": pa.int64(), "chosen": pa.bool_(), "judge_overall": pa.float64()}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, two edits each."""
    folder = tmp_path_factory.mktemp("preferences")
    write_shards(folder / "in", shards=1, rows=6, damaged=())
    data = recipe_data(folder / "in", folder / "out", sink={"include_input": True, "shard_size": 0}, engine="local")
    assert driver.run(recipe_from(data), progress="off").complete
    return folder / "out"


@pytest.fixture(scope="module")
def attempts(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both edits of an image as two attempts at one instruction; the second has the higher score, and was chosen."""

    def change(number: int, row: dict[str, Any]) -> dict[str, Any]:
        second = number % 2
        said = {"instruction": "do it", "target_prompt": "done", "edit": "a"}
        return row | said | {"attempt": second + 1, "chosen": bool(second), "judge_overall": 3.0 + second * number}

    return rewritten(plain, tmp_path_factory.mktemp("attempts") / "out", change, SCORE)


def made(run: Path, out: Path, **settings: Any) -> Any:
    return export(
        ExportConfig(**{"runs": (str(run),), "out": str(out), "preset": "preference", "validation": 0.2} | settings)
    )


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(run.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


def pixels(image: Any) -> bytes:
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    return np.asarray(picture).tobytes()


def test_the_best_attempt_is_preferred_to_the_worst_by_its_score(attempts, tmp_path):
    result = made(attempts, tmp_path / "set", score="judge_overall")
    assert result.splits == {"train": 5, "validation": 1}
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    by_picture = {pixels(row["image"]["bytes"]): row for row in rows_of(attempts)}
    names = ("source_image", "prompt", "chosen_image", "rejected_image", "chosen_score", "rejected_score")
    for row in (*loaded["train"], *loaded["validation"]):
        assert tuple(row) == (*names, "score_name", "margin", "edit_type")
        better, worse = (by_picture[pixels(row[name])] for name in ("chosen_image", "rejected_image"))
        assert better["id"] == worse["id"]
        assert (better["attempt"], worse["attempt"]) == (2, 1)
        assert (row["chosen_score"], row["rejected_score"]) == (better["judge_overall"], 3.0)
        assert row["margin"] == row["chosen_score"] - row["rejected_score"] > 0
        assert (row["score_name"], row["prompt"], row["edit_type"]) == ("judge_overall", "do it", "a")


def test_a_trainer_of_diffusers_reads_the_winner_by_its_label(attempts, tmp_path):
    made(attempts, tmp_path / "set", preset="diffusion_dpo", score="judge_overall")
    loaded = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert {"jpg_0", "jpg_1", "label_0", "caption"} <= set(loaded.column_names)
    second = {pixels(row["image"]["bytes"]) for row in rows_of(attempts) if row["attempt"] == 2}
    batch = loaded[:]
    for first, other, label in zip(batch["jpg_0"], batch["jpg_1"], batch["label_0"], strict=True):
        assert isinstance(first, bytes)
        winner, loser = (other, first) if label == 0 else (first, other)
        assert pixels(winner) in second
        assert pixels(loser) not in second
    assert set(batch["label_0"]) == {0, 1}
    assert set(batch["caption"]) == {"done"}


def test_only_chosen_attempts_are_exported_unless_the_others_are_asked_for(attempts, tmp_path):
    result = made(attempts, tmp_path / "chosen", preset="instructpix2pix")
    assert (sum(result.splits.values()), result.rejected) == (6, 6)
    result = made(attempts, tmp_path / "all", preset="instructpix2pix", with_rejected=True)
    assert (sum(result.splits.values()), result.rejected) == (12, 0)
    rows = [row for path in tmp_path.glob("all/data/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert Counter(row["accepted"] for row in rows) == {True: 6, False: 6}
    made(attempts, tmp_path / "tars", preset="webdataset", with_rejected=True, validation=0)


def test_two_runs_of_the_same_sources_make_pairs_and_their_keys_stay_apart(plain, tmp_path):
    def worse(number: int, row: dict[str, Any]) -> dict[str, Any]:
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).rotate(180)
        file = io.BytesIO()
        picture.save(file, "PNG")
        return row | {"image": {**row["image"], "bytes": file.getvalue()}, "background_psnr": 1.0 if number else None}

    other = rewritten(plain, tmp_path / "other", worse, {})
    both = (str(plain), str(other))
    result = made(plain, tmp_path / "set", runs=both, score="background_psnr")
    assert sum(result.splits.values()) == 11
    assert result.notes == ("no pair of 1 instruction(s): 1 times without background_psnr",)
    first = defaultdict(set)
    for row in rows_of(plain):
        first[row["instruction"]].add(pixels(row["image"]["bytes"]))
    for path in tmp_path.glob("set/data/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert pixels(row["chosen_image"]["bytes"]) in first[row["prompt"]]
            assert pixels(row["rejected_image"]["bytes"]) not in first[row["prompt"]]
    made(plain, tmp_path / "brushed", runs=both, preset="magicbrush")
    rows = [row for path in tmp_path.glob("brushed/data/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len({row["img_id"] for row in rows}) == len(rows) == 24


def test_what_gates_rejected_is_the_worse_one_and_is_exported_only_where_asked_for(tmp_path):
    write_shards(tmp_path / "in", shards=1, rows=3, damaged=())
    data = recipe_data(tmp_path / "in", tmp_path / "out", sink={"include_input": True}, engine="local")
    data["gates"] = {"preset": "none", "change_inside": {"min": 62}}  # the first attempts change 64 to 80, weak ones 58
    data["best_of"] = {"attempts": 2, "until": "budget", "rank_by": "change_inside", "vary": [{"scale": 0.2}]}
    driver.run(recipe_from(data), progress="off")
    kept, weak = (
        {
            (row["id"], row["edit"]): row
            for path in tmp_path.glob(f"out/{kind}/*.parquet")
            for row in pq.read_table(path).to_pylist()
        }
        for kind in ("data", "rejected")
    )
    assert {tuple(row["reject_reasons"]) for row in weak.values()} == {("change_inside",)}
    result = made(tmp_path / "out", tmp_path / "set", validation=0)
    assert result.splits == {"train": 6}
    pairs = {(pixels(kept[key]["image"]["bytes"]), pixels(weak[key]["image"]["bytes"])) for key in kept}
    exported = [row for path in tmp_path.glob("set/data/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {(pixels(row["chosen_image"]["bytes"]), pixels(row["rejected_image"]["bytes"])) for row in exported} == pairs
    assert {(row["score_name"], row["margin"]) for row in exported} == {("gates", None)}
    result = made(tmp_path / "out", tmp_path / "plain", preset="instructpix2pix")
    assert (sum(result.splits.values()), result.rejected) == (6, 6)
    assert "| change\\_inside | 6 |" in (tmp_path / "plain" / "README.md").read_text()


def candidate(number: int, score: float | None, *, accepted: bool = True) -> Candidate:
    return Candidate(Place(0, "data/a", number), 1, b"s", accepted, score)


@pytest.mark.parametrize(
    ("scores", "accepted", "higher", "margin", "expected"),
    [
        ((1.0, 3.0, 2.0), "yyy", True, 0.0, (1, 0)),
        ((1.0, 3.0, 2.0), "yyy", False, 0.0, (0, 1)),
        ((1.0, 3.0, 2.0), "yny", True, 0.0, (2, 0)),  # what gates rejected is never the better one
        ((3.0, 1.0), "ny", True, 0.0, NONE_BELOW),  # and no worse one scores above it
        ((2.0, 2.0), "yy", True, 0.0, NONE_BELOW),
        ((2.0, 2.5), "yy", True, 0.6, "less than 0.6 apart"),
        ((2.0, 2.5), "yy", True, 0.5, (1, 0)),
        ((2.0, None), "yy", True, 0.0, "without s"),
        ((2.0, 1.0), "nn", True, 0.0, "no result passed the gates"),
        ((2.0,), "y", True, 0.0, "one result alone"),
    ],
)
def test_which_results_make_a_pair(scores, accepted, higher, margin, expected):
    candidates = [
        candidate(at, score, accepted=flag == "y")
        for at, (score, flag) in enumerate(zip(scores, accepted, strict=True))
    ]
    why_not: Counter[str] = Counter()
    pair = pairs_among(candidates, Score("s", higher), margin, why_not)
    if isinstance(expected, str):
        assert pair is None
        assert why_not == {expected: 1}
    else:
        assert pair is not None
        assert (pair.better.place.row, pair.worse.place.row) == expected


def test_a_score_must_be_one_of_the_runs_and_have_a_better_end(plain, tmp_path):
    assert score_of("rest_change", None, {"rest_change"}) == Score("rest_change", higher=False)
    assert score_of("rest_change", "higher", {"rest_change"}) == Score("rest_change", higher=True)
    for match, settings in {
        "score: 'beauty' is no figure of these runs. They have: .*background_psnr": {"score": "beauty"},
        "better: say which end of image_psnr is wanted": {"score": "image_psnr"},
        "score: is missing: --better": {"better": "higher"},
        "pairs: there is none: 12 times one result alone": {},
        "min_margin: needs a --score": {"min_margin": 1.0},
        "with_rejected: is for single results": {"with_rejected": True},
    }.items():
        with pytest.raises(RecipeError, match=match):
            made(plain, tmp_path / "set", **settings)
        assert not (tmp_path / "set").exists()


def test_a_run_that_has_lost_results_is_not_exported(plain, tmp_path):
    run = rewritten(plain, tmp_path / "run", lambda number, row: row, {})
    next(run.glob("data/*.parquet")).unlink()
    with pytest.raises(SinkError, match=r"is not whole: its summary\.json counts 12 results, and 8 are there"):
        made(run, tmp_path / "set", preset="instructpix2pix")
    assert not (tmp_path / "set").exists()
