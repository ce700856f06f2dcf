"""Several attempts at a result: which are made, which is kept, and that all of them are rows that can be made again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.best_of import best_of
from pipeline.errors import EncodeError, RecipeError
from pipeline.gating import inverting
from pipeline.looking.regenerate import regenerate
from pipeline.looking.report.page import write_report
from pipeline.looking.runs import find_run
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Asked, Concept, EditRequest, Rejected
from pipeline.running import driver
from pipeline.seeds import run_seed_of, seed_for
from pipeline.settings.best_of import BestOfConfig
from pipeline.writing import restoring
from tests.running.test_gated_runs import checked, gated, rows
from tests.runs import contents, write_shards
from tests.writing.making import make_rejected, make_sample

GATES = {"preset": "none", "change_inside": {"min": 70}}


def tried(folder: Path, out: str = "out", gates: dict[str, Any] | None = None, **best: Any) -> Recipe:
    return gated(folder, out, gates or GATES, best_of={"attempts": 3, **best})


def attempts(recipe: Recipe) -> list[dict[str, Any]]:
    return sorted(
        (row for kind in ("data", "rejected") for row in rows(recipe, kind)),
        key=lambda row: (row["id"], row["edit"], row["attempt"]),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three images, one of which is none; edit a passes at once, and b with half of the scale never does."""
    folder = tmp_path_factory.mktemp("tried")
    write_shards(folder / "in", shards=1, rows=3, damaged=(1,))
    recipe = tried(folder, vary=[{"scale": 0.5}, {"threshold": 0.5, "new_seed": False}])
    driver.run(recipe, progress="off")
    return recipe


def test_what_passes_is_not_tried_again_and_what_does_not_is_until_the_budget_is_spent(done: Recipe) -> None:
    made = Counter((row["id"], row["edit"]) for row in attempts(done))
    kept = {(row["id"], row["edit"]): row for row in rows(done, "data")}
    for key, count in made.items():
        assert count == (kept[key]["attempt"] + 1 if key in kept else 3)
    assert set(made.values()) >= {1, 3}
    assert len(rows(done, "quarantine")) == 2  # a first attempt that fails is the only one
    assert checked(done).findings == []


def test_one_attempt_is_chosen_and_all_say_how_they_were_made(done: Recipe) -> None:
    assert all(row["chosen"] and not row["reject_reasons"] for row in rows(done, "data"))
    assert not any(row["chosen"] for row in rows(done, "rejected"))
    first, half, other = next(
        some for key in {row["id"] for row in attempts(done)}
        if len(some := [row for row in attempts(done) if (row["id"], row["edit"]) == (key, "b")]) == 3
    )  # fmt: skip
    scales = [json.loads(row["request"])["concepts"][0]["guidance_scale"] for row in (first, half, other)]
    assert scales == [5.0, 2.5, 5.0]
    assert json.loads(other["request"])["concepts"][0]["threshold"] == 0.5
    assert first["seed"] == other["seed"] != half["seed"]
    assert half["seed"] == seed_for(seed_for(0, "attempt", "1"), first["id"], "ddpm")
    assert json.loads(half["settings"])["editing"]["method"] == "ledits_pp"


def test_an_attempt_is_made_again_to_the_same_bytes(done: Recipe) -> None:
    for row in (rows(done, "rejected")[-1], rows(done, "data")[0]):
        made = regenerate(find_run(done.sink.folder), row["id"], edit=row["edit"], attempt=row["attempt"])
        assert made.equal, made.differences
    write_report(done.sink)
    assert "attempt 3" in Path(done.sink.folder, "report.html").read_text()


def test_attempts_are_counted_once_as_results(done: Recipe, tmp_path: Path) -> None:
    summary = driver.run(done, progress="off")
    assert (summary.planned, summary.failed) == (6, 2)
    assert summary.done + summary.rejected == 4
    assert summary.rejected_rows == len(rows(done, "rejected")) > summary.rejected


def test_attempts_in_tars_and_after_another_order_of_units_are_the_same(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    one, other = (tried(tmp_path, name, until="budget", rank_by="change_inside") for name in ("one", "other"))
    other = other.model_copy(update={"run": other.run.model_copy(update={"images_in_flight": 1})})
    for recipe in (one, other):
        driver.run(recipe, progress="off")
    assert contents(Path(one.sink.folder)) == contents(Path(other.sink.folder))
    assert len(attempts(one)) == 12
    tar = one.model_copy(
        update={"sink": one.sink.model_copy(update={"format": "webdataset", "folder": str(tmp_path / "tar")})}
    )
    driver.run(tar, progress="off")
    assert checked(tar).findings == []


def test_an_attempt_that_fails_is_named_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "in", shards=1, rows=1, damaged=())
    recipe = tried(tmp_path, until="budget")
    restored = restoring.restored

    def hindered(decoded: Any) -> Any:
        if decoded.prepared.attempt == 1:
            raise EncodeError("no room")
        return restored(decoded)

    monkeypatch.setattr(restoring, "restored", hindered)
    assert driver.run(recipe, progress="off").failed == 0
    found = attempts(recipe)
    assert [row["attempt"] for row in found] == [0, 2, 0, 2]
    assert all(row["attempts_failed"] == ["1: encode: EncodeError: no room"] for row in found)
    assert checked(recipe).findings == []


DDIM = {"inversion": {"method": "ddim", "num_steps": 4}, "editing": {"method": "cfg"}}
TARGET = {"edits": {"a": {"target_prompt": "a dog"}}}


def network_rows(folder: Path, out: str, **sections: Any) -> int:
    best = {"attempts": 3, "until": "budget", "rank_by": "change_inside", **sections.pop("best_of")}
    recipe = gated(folder, out, {"preset": "none", "mask_share": {"min": 0}}, best_of=best, **sections)
    return driver.run(recipe, progress="off").network_rows


@pytest.mark.parametrize(
    ("vary", "sections", "inversions"),
    [
        ([{"new_seed": False, "scale": 2.0}], {}, 1),
        ([{"scale": 2.0}], {}, 3),  # other noise: other trajectories
        ([{"new_seed": False, "inversion": {"skip": 0.5}}, {"new_seed": False}], {}, 2),
        ([{}], {**DDIM, **TARGET}, 1),  # without noise, whatever the seed is
    ],
)
def test_attempts_share_an_inversion_of_equal_settings_and_noise(
    vary: list[dict[str, Any]],
    sections: dict[str, Any],
    inversions: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    shared = network_rows(tmp_path, "shared", best_of={"vary": vary}, **sections)
    monkeypatch.setattr(inverting, "MOST_BYTES", 0)
    apart = network_rows(tmp_path, "apart", best_of={"vary": vary}, **sections)
    assert apart - shared == 2 * 4 * (3 - inversions)  # images, steps
    assert contents(tmp_path / "shared") == contents(tmp_path / "apart")


def test_a_units_kept_inversions_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "in", shards=1, rows=2, damaged=())
    monkeypatch.setattr(inverting, "bytes_of", lambda trajectory: 1)
    monkeypatch.setattr(inverting, "MOST_BYTES", 1)  # one of two images
    one = network_rows(tmp_path, "one", best_of={"vary": [{"new_seed": False}]})
    monkeypatch.setattr(inverting, "MOST_BYTES", 2)
    assert one - network_rows(tmp_path, "both", best_of={"vary": [{"new_seed": False}]}) == 2 * 4  # attempts, steps


def row_of(attempt: int, rank: float | None, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "index": 0, "edit": "a", "method": "m", "attempt": attempt, "background_psnr": rank,
        "reject_reasons": list(reasons),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("made", "chosen"),
    [
        ([row_of(0, 20.0), row_of(1, 30.0), row_of(2, 25.0)], 1),
        (
            [row_of(0, 20.0), row_of(1, 90.0, ("mask_share",)), row_of(2, 20.0)],
            0,
        ),  # rejected; and of equal ones the first
        ([row_of(0, None), row_of(1, 1.0), row_of(2, None)], 1),
        ([row_of(0, 9.0, ("x",)), row_of(1, 9.0, ("x",)), row_of(2, 9.0, ("x",))], None),
    ],
)
def test_of_those_that_pass_the_best_is_chosen(made: list[dict[str, Any]], chosen: int | None, tmp_path: Path) -> None:
    asked = Asked(sample=make_sample(0), edits=("a",), requests={"a": EditRequest(concepts=(Concept(prompt="x"),))})
    left = list(made)
    found = best_of([asked], tried(tmp_path, until="budget", rank_by="background_psnr"), lambda _: [left.pop(0)])
    kept = [row["attempt"] for row in found if not isinstance(row, Rejected) and row["chosen"]]
    assert kept == ([] if chosen is None else [chosen])


def test_only_what_is_wanted_is_asked_for_again(tmp_path: Path) -> None:
    requests = {name: EditRequest(concepts=(Concept(prompt=name),)) for name in ("a", "b")}
    rows = [Asked(sample=make_sample(at), edits=("a", "b"), requests=requests) for at in (0, 1)]
    seen: list[Any] = []

    def make(asked: Any) -> list[Any]:
        seen.append([(one.sample.index, one.attempt, one.only) for one in asked])
        if len(seen) > 1:
            return [row_of(1, 1.0) | {"index": 1, "edit": "b"}]
        first = {(0, "a"): (), (0, "b"): (), (1, "a"): ()}
        made: list[Any] = [row_of(0, 1.0, why) | {"index": at, "edit": edit} for (at, edit), why in first.items()]
        return [*made, row_of(0, 1.0, ("x",)) | {"index": 1, "edit": "b"}]

    best_of(rows, tried(tmp_path), make)
    assert seen == [[(0, 0, None), (1, 0, None)], [(1, 1, frozenset({("b", "m")}))]]


def test_a_first_attempt_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    asked, calls = Asked(sample=make_sample(0), edits=("a",)), []

    def make(rows: Any) -> list[Any]:
        calls.append(rows)
        return [make_rejected(0, "a")]

    assert [type(one) for one in best_of([asked], tried(tmp_path), make)] == [Rejected]
    assert len(calls) == 1


def test_seeds_of_attempts_derive_from_the_runs() -> None:
    config = BestOfConfig.model_validate({"attempts": 4, "vary": [{"new_seed": False}, {}]})
    seeds = [run_seed_of(7, config, attempt) for attempt in range(4)]
    assert seeds[:2] == [7, 7]
    assert seeds[2] == seed_for(7, "attempt", "2")
    assert seeds[3] == 7
    assert run_seed_of(7, None, 0) == 7


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ({"attempts": 1}, "best_of.attempts: should be a whole number from 2 to 64"),
        ({"vary": [{"editing": {"skp": 0.1}}]}, "best_of.vary.0.editing"),
        ({"vary": [{}, {}, {}]}, "has 3 variations for 2 attempts after the first"),
        ({"vary": [{"inversion": {"method": "noise"}}]}, "best_of.vary.0: editing.method 'ledits_pp' cannot work with"),
        ({"rank_by": "clip_sim_dir"}, "nothing measures clip_sim_dir. Set gates.clip"),
    ],
)
def test_attempts_that_cannot_be_made_are_refused_with_the_way_out(
    best: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as refused:
        tried(tmp_path, **best)
    assert said in str(refused.value)


def test_attempts_without_gates_are_refused(tmp_path: Path) -> None:
    data = gated(tmp_path, "out").model_dump(mode="json", exclude={"methods", "gates"})
    with pytest.raises(RecipeError, match=r"there are none. Add a section gates"):
        recipe_from(data | {"best_of": {"attempts": 2}})
