"""The score of gates: what counts as correct, which kind is hardest, and that its recipe is possible."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from demo_world import gates_score
from demo_world.gates_score import asked_of_items, best_of_some, hardest, is_correct, of_kind, recipe_of
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


def test_only_scenes_whose_kept_attempt_is_correct_count() -> None:
    items = of_kind("7", 4, seed=3)

    class Maker:
        recipe = recipe_of(gates_score.GATES)

        def __call__(self, asked: Any) -> list[dict[str, Any]]:
            """Of four scenes the third never passes, and the fourth passes without the beard."""
            return [
                row_of(
                    Scene(**items[at].facts["before" if at == 3 else "after"]),
                    index=at, edit="edit", method="ledits_pp", attempt=one.attempt, edit_change=1.0,
                    reject_reasons=["mask_share"] if at == 2 else [],
                )
                for one in asked
                for at in [one.sample.index]
            ]  # fmt: skip

    assert best_of_some(Maker(), items) == (0.5, 0.75)  # type: ignore[arg-type]


def test_scenes_are_rows_that_bring_their_edits() -> None:
    items = [*items_of(3, seed=3)]
    asked = asked_of_items(items)
    assert [one.requests["edit"] for one in asked] == [item.request for item in items]
    assert [one.sample.index for one in asked] == [0, 1, 2]
    assert asdict(asked[0].sample)["image"] == items[0].image
