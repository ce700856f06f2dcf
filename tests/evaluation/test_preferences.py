"""Which of two results is better: asked in both orders, once, and counted as pairs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.job.counted import counts_of
from pipeline.evaluation.job.preferring import differences_in, with_preferences
from pipeline.evaluation.job.run import Evaluation, evaluate
from pipeline.evaluation.score_rows import preferences_in
from pipeline.reading.decode import decode
from pipeline.writing.rows import encode_png
from tests.evaluation.fake_judge import FakeJudge, Reply, Script, fake_judge
from tests.evaluation.test_evaluate import drawn, written

METHODS = ("dark", "light", "white")
COUNT = 12


def imgedit(folder: Path, judge: FakeJudge, **settings: Any) -> dict[str, Any]:
    """Results of three methods: the same picture, each lighter than the last."""
    (folder / "origin").mkdir(parents=True)
    table = {}
    for number in range(COUNT):
        picture = np.full((16, 16, 3), number, dtype=np.uint8)
        (folder / "origin" / f"{number}.png").write_bytes(encode_png(picture))
        table[str(number)] = {"id": f"{number}.png", "prompt": f"Add {number}.", "edit_type": "add"}
        for shade, method in enumerate(METHODS, 1):
            (folder / method).mkdir(exist_ok=True)
            (folder / method / f"{number}.png").write_bytes(encode_png(picture + 60 * shade))
    (folder / "basic_edit.json").write_text(json.dumps(table))
    return {
        "set": {"kind": "imgedit_bench", "folder": str(folder)},
        "results": {method: str(folder / method) for method in ("white", "dark", "light")},  # not by name
        "sink": {"folder": str(folder / "out")},
        "statistics": {"resamples": 199},
        "judge": {"base_url": judge.url, "model": "fake", "protocol": "pairwise", "concurrency": 2, **settings},
    }


def shades(folder: Path) -> dict[str, int]:
    """How light a result is, by the digest that the judge knows it by."""
    found = {}
    for method in METHODS:
        for path in (folder / method).iterdir():
            pixels = decode(path.read_bytes(), 10**6)[0]
            found[hashlib.sha256(encode_png(pixels)).hexdigest()] = int(pixels[0, 0, 0])
    return found


def likes_light(folder: Path) -> Script:
    known = shades(folder)

    def script(digest: str, part: str, attempt: int) -> Reply:
        first, second = (known[one] for one in digest.split(":"))
        return Reply(content=json.dumps({"reasoning": "light", "better": "A" if first > second else "B"}))

    return script


def done(data: dict[str, Any], **more: Any) -> Evaluation:
    return evaluate(evaluation_from(data), progress="off", **more)


def pairs_in(folder: Path) -> list[dict[str, Any]]:
    return preferences_in((folder / "out" / "evaluate" / "preferences" / "items-00000.parquet").read_bytes())


def test_every_pair_is_asked_about_in_both_orders_once_and_the_better_method_wins(tmp_path):
    with fake_judge() as judge:
        data = imgedit(tmp_path, judge)
        judge.script = likes_light(tmp_path)
        found = done(data)
        assert sum(judge.asked.values()) == found.requests == COUNT * 3 * 2
        assert set(judge.asked.values()) == {1}
        assert done(data).requests == 0, "nothing is asked a second time"
        assert {len(body["messages"][0]["content"]) for body in judge.bodies} == {4}
    line = found.tables.lines["judge_preference"]
    means = {method: line[method].own.mean_of_items for method in METHODS}
    assert means == {"dark": 0.0, "light": 0.5, "white": 1.0}
    wins = {(one.first, one.second): (one.n, one.wins, one.losses) for one in found.tables.pairs["judge_preference"]}
    assert wins == {("white", "dark"): (12, 12, 0), ("white", "light"): (12, 12, 0), ("dark", "light"): (12, 0, 12)}
    assert all(one.p_adjusted < 0.05 and one.tests == 3 for one in found.tables.pairs["judge_preference"])
    assert "judge preference" in (tmp_path / "out" / "evaluate" / "table.md").read_text()


def test_a_judge_that_takes_what_it_sees_first_has_said_nothing(tmp_path):
    with fake_judge() as judge:
        found = done(imgedit(tmp_path, judge))
    assert {row["preference"] for row in pairs_in(tmp_path)} == {0.0}
    assert all(row["judge_flags"] == ["order_decides"] for row in pairs_in(tmp_path))
    assert any("order_decides 36" in remark for remark in found.tables.remarks)
    (one, *_) = found.tables.pairs["judge_preference"]
    assert (one.ties, one.p) == (12, 1.0)


def test_a_pair_without_a_choice_in_one_order_has_a_reason_and_is_asked_again_on_request(tmp_path):
    with fake_judge() as judge:
        data = imgedit(tmp_path, judge)
        known = shades(tmp_path)

        def script(digest: str, part: str, attempt: int) -> Reply:
            first, second = (known[one] for one in digest.split(":"))
            return Reply(content="both are fine") if first > second else Reply()

        judge.script = script
        found = done(data)
        assert {row["judge_reason"] for row in pairs_in(tmp_path)} == {"no_json"}
        assert {row["preference"] for row in pairs_in(tmp_path)} == {None}
        assert "judge_preference" not in found.tables.lines, "one order alone is no preference"
        judge.script = likes_light(tmp_path)
        again = done(data, retry_failed=True)
        assert again.requests == COUNT * 3, "those with a choice are not asked again"
    assert {row["judge_reason"] for row in pairs_in(tmp_path)} == {None}


def test_what_has_no_picture_is_in_no_pair(tmp_path):
    with fake_judge() as judge:
        data = imgedit(tmp_path, judge)
        (tmp_path / "light" / "3.png").unlink()
        (tmp_path / "dark" / "4.png").write_bytes(b"no picture")
        done(data)
    rows = pairs_in(tmp_path)
    assert len(rows) == COUNT * 3 - 2 - 2
    assert [(row["first"], row["second"]) for row in rows if row["item"] == "3"] == [("dark", "white")]


def test_own_edits_are_compared_and_counted_and_a_second_run_writes_the_same_bytes(tmp_path):
    with fake_judge(lambda *_: Reply(content='{"better": "tie"}')) as judge:
        section = {"base_url": judge.url, "model": "fake", "protocol": "pairwise"}
        counted = counts_of(evaluation_from(drawn(tmp_path / "one", judge=section)))
        assert counted.questions == 12 * 1 * 2
        for name in ("one", "two"):
            before = sum(judge.asked.values())
            found = done(drawn(tmp_path / name, judge=section))
            assert sum(judge.asked.values()) - before == found.requests == counted.questions
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize("methods", [("a", "b"), ("b", "a")])
def test_a_preference_is_turned_with_its_pair(methods):
    rows = [{"item": "x", "edit": "", "image": "x", "first": "a", "second": "b", "preference": 0.5}]
    sign = 1 if methods == ("a", "b") else -1
    assert differences_in(rows, methods) == {methods: [("x", sign * 0.5)]}
    scored = with_preferences([{"item": "x", "edit": "", "method": name} for name in "ab"], rows)
    assert [row["judge_preference"] for row in scored] == [0.75, 0.25]
