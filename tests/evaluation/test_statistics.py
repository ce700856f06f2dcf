"""Means, intervals and tests, where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.agreement import agreement
from pipeline.evaluation.measures import MEASURES
from pipeline.evaluation.statistics import (
    Described,
    Score,
    Settings,
    adjust,
    compare_all,
    describe,
    interval_of_mean,
    signed_rank,
)
from pipeline.evaluation.tables import cell, latex, markdown, tables_of

QUICK = Settings(resamples=999)


def scores(values: dict[str, float | None], kind: str = "t", images: int | None = None) -> list[Score]:
    return [
        Score(image=name if images is None else str(at % images), item=name, edit_type=kind, value=value)
        for at, (name, value) in enumerate(values.items())
        if value is not None
    ]


def test_edits_of_one_image_are_resampled_together():
    rng = np.random.default_rng(0)
    of_image = rng.normal(size=20)
    together = [(str(image), float(of_image[image])) for image in range(20) for _ in range(50)]
    apart = [(str(at), value) for at, (_, value) in enumerate(together)]
    wide, narrow = (np.diff(interval_of_mean(some, QUICK)) for some in (together, apart))
    assert wide > 4 * narrow, "fifty copies of an image are one witness"


def test_few_images_have_no_interval_and_equal_values_a_point():
    assert interval_of_mean([(str(at), float(at)) for at in range(9)], QUICK) is None
    assert interval_of_mean([(str(at), 2.5) for at in range(12)], QUICK) == (2.5, 2.5)
    assert describe([], QUICK).mean_of_items is None


def test_types_weigh_the_same_in_their_mean_whatever_their_number():
    many, few = scores({str(at): 1.0 for at in range(30)}, "a"), scores({"x": 3.0, "y": 3.0}, "b")
    found = describe(many + few, QUICK)
    assert found.mean_of_types == 2.0
    assert found.mean_of_items == pytest.approx(36 / 32)
    assert (found.types["a"].n, found.types["b"].n) == (30, 2)


def test_methods_are_compared_on_what_both_have():
    first = scores({"a": 1.0, "b": 2.0, "c": 9.0})
    second = scores({"a": 1.0 + 1e-12, "b": 1.0, "d": 0.0})
    (pair,) = compare_all({"x": first, "y": second}, QUICK)
    assert (pair.n, pair.wins, pair.ties, pair.losses) == (2, 1, 1, 0)
    assert pair.mean_difference == pytest.approx(0.5)
    assert signed_rank([0.0, 0.0]) == 1.0
    assert signed_rank([]) is None


def test_corrections_by_hand():
    assert adjust([0.01, 0.04, 0.03], "holm") == pytest.approx([0.03, 0.06, 0.06])
    assert adjust([0.01, 0.04, 0.5], "bonferroni") == pytest.approx([0.03, 0.12, 1.0])


def test_a_cell_has_two_ends_where_they_are_not_alike():
    plain = {"n": 12, "median": 1.0, "mean_of_types": None, "types_interval": None, "types": {}}
    measure = MEASURES["psnr_unedit_part"]
    assert cell(Described(mean_of_items=20.0, interval=(19.5, 20.5), **plain), measure) == "20.00 ± 0.50"
    assert cell(Described(mean_of_items=20.0, interval=(19.0, 20.5), **plain), measure) == "20.00 [19.00, 20.50]"
    assert cell(Described(mean_of_items=20.0, interval=None, **plain), measure) == "20.00"


def test_a_table_marks_the_best_and_what_cannot_be_told_from_it_and_counts_every_row():
    rng = np.random.default_rng(1)
    base = rng.normal(20, 1, 40)
    values = {"good": base + 3, "alike": base + 3 + rng.normal(0, 0.1, 40), "bad_one": base}
    rows = [
        {
            "item": str(at),
            "image": str(at),
            "edit": "",
            "edit_type": str(at % 2),
            "method": method,
            "reason": "failed_edit" if (method, at) == ("bad_one", 7) else "",
            "notes": ["psnr_infinite"] if (method, at) == ("good", 3) else [],
            "psnr_unedit_part": None if (method, at) in {("bad_one", 7), ("good", 3)} else float(some[at]),
        }
        for method, some in values.items()
        for at in range(40)
    ]
    measures = {"psnr_unedit_part": MEASURES["psnr_unedit_part"], "mask_iou": MEASURES["mask_iou"]}
    tables = tables_of(rows, list(values), measures, QUICK, title="T", unavailable={"x": "get it"})
    assert list(tables.measures) == ["psnr_unedit_part"], "nobody has a number in the other"
    some = [row | {"mask_iou": 0.5 if row["method"] == "good" else None} for row in rows]
    overlap = tables_of(some, list(values), measures, QUICK, title="T", unavailable={}).lines["mask_iou"]
    assert (overlap["good"].common.n, overlap["alike"].common.n) == (40, 0), "who has none keeps nobody from it"
    assert {method: line.common.n for method, line in tables.lines["psnr_unedit_part"].items()} == dict.fromkeys(
        values, 38
    )
    assert tables.lines["psnr_unedit_part"]["alike"].own.n == 40
    page = markdown(tables)
    best = next(line for line in page.splitlines() if "**" in line)
    near = next(line for line in page.splitlines() if "<u>" in line)
    assert {best.split("`")[1], near.split("`")[1]} == {"good", "alike"}
    assert "| `bad_one` | 40 | failed_edit | 1 |" in page
    assert "| `good` | 40 | psnr_infinite | 1 |" in page
    assert "38 of 40" in page
    text = latex(tables)
    assert r"bad\_one" in text
    assert r"\textbf{" in text


def judged(*scores: tuple[str, str, float | None]) -> list[dict[str, object]]:
    return [{"item": item, "edit": "", "method": method, "judge_overall": score} for item, method, score in scores]


def test_two_judges_agree_where_they_rank_results_and_choose_winners_alike():
    one = judged(("1", "a", 5), ("1", "b", 7), ("2", "a", 3), ("2", "b", 4), ("3", "a", None), ("3", "b", 9))
    same = judged(("1", "a", 50), ("1", "b", 70), ("2", "a", 30), ("2", "b", 40), ("3", "a", 1))
    found = agreement(one, same)
    assert (found.n, found.spearman, found.items, found.equal_winners) == (4, pytest.approx(1.0), 2, 1.0)
    turned = judged(("1", "a", 7), ("1", "b", 5), ("2", "a", 3), ("2", "b", 4))
    assert agreement(one, turned).equal_winners == 0.5
    tied = judged(("1", "a", 7), ("1", "b", 7), ("2", "a", 3), ("2", "b", 4))
    assert agreement(one, tied).equal_winners == 0.5, "two winners are not one"
    assert agreement(one, judged(("1", "a", 1))).spearman is None
