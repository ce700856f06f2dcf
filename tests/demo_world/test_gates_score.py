"""The score of gates: what counts as correct, which kind is hardest, and that its recipe is possible."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from demo_world import gates_score
from demo_world.gates_score import (
    asked_of_items,
    best_of_figures,
    hardest,
    is_correct,
    of_kind,
    recipe_of,
    tried,
)
from pipeline.evaluation.benchmarks.drawn import KINDS, items_of
from pipeline.models.demo.world import Scene, draw, edited
from pipeline.writing.rows import encode_png


def row_of(scene: Scene, **columns: Any) -> dict[str, Any]:
    return {"image": {"bytes": encode_png(draw(scene, 128))}, **columns}


def test_a_result_is_correct_where_all_that_should_change_did_and_nothing_else() -> None:
    (item,) = of_kind("7", 1, seed=3)  # a beard
    wanted = Scene(**item.facts["after"])
    assert is_correct(row_of(wanted), item)
    assert not is_correct(row_of(Scene(**item.facts["before"])), item)
    assert not is_correct(row_of(edited(wanted, sunglasses=not wanted.sunglasses)), item)


def test_the_hardest_kind_has_the_fewest_correct_results() -> None:
    made = [(item, {}, item.edit_type != "6") for item in items_of(2 * len(KINDS), seed=3)]
    assert hardest(made) == "6"


def attempts_of(at: int, items: Any, gains: tuple[float, float], psnrs: tuple[float, float]) -> list[dict[str, Any]]:
    """Two attempts at a scene, of which the second alone is correct."""
    return [
        row_of(
            Scene(**items[at].facts["after" if attempt else "before"]),
            index=at, edit="edit", method="ledits_pp", attempt=attempt, denoise_gain=gains[attempt],
            background_psnr=psnrs[attempt], change_inside=None, edit_change=1.0, reject_reasons=[],
        )
        for attempt in (0, 1)
    ]  # fmt: skip


def test_shares_are_of_all_scenes_and_of_what_each_figure_would_have_kept() -> None:
    items = of_kind("7", 3, seed=3)
    made = [attempts_of(0, items, (-1, 1), (30, 20)), attempts_of(1, items, (1, -1), (20, 30))]
    made.append(attempts_of(2, items, (0, 1), (20, 30)))
    made[2][1]["reject_reasons"] = made[2][0]["reject_reasons"] = ["mask_share"]

    class Maker:
        recipe = recipe_of(gates_score.GATES, {"attempts": 2, "until": "budget"})

        def __call__(self, asked: Any) -> list[dict[str, Any]]:
            return [made[one.sample.index][one.attempt] for one in asked]

    found = best_of_figures(tried(Maker(), items))  # type: ignore[arg-type]
    third = 1 / 3
    assert (found["hardest_before"], found["hardest_possible"]) == (0.0, 1.0)
    assert (found["best_of_4"], found["best_of_4_kept"]) == (third, 2 * third)
    assert (found["best_of_4_by_denoise_gain"], found["best_of_4_by_background_psnr"]) == (third, third)
    assert found["best_of_4_by_edit_change"] == 0.0  # of equal ones the first
    assert found["best_of_4_by_change_inside"] == 0.0


def test_its_attempts_are_possible() -> None:
    recipe = recipe_of(gates_score.GATES_OF_ATTEMPTS, gates_score.BEST_OF)
    assert recipe.measures_gain
    assert not recipe_of(gates_score.GATES).measures_gain


def test_scenes_are_rows_that_bring_their_edits() -> None:
    items = [*items_of(3, seed=3)]
    asked = asked_of_items(items)
    assert [one.requests["edit"] for one in asked] == [item.request for item in items]
    assert [one.sample.index for one in asked] == [0, 1, 2]
    assert asdict(asked[0].sample)["image"] == items[0].image
