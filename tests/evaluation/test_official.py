"""The benchmarks' own aggregates: groups weigh alike, what is empty is named, both overall figures are printed."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluation.benchmarks.gedit_bench import GROUPS
from pipeline.evaluation.official import gedit_aggregates, imgedit_aggregates
from pipeline.evaluation.official_tables import official_grids


def gedit_row(group: str, sc: float, pq: float, *, intersection: bool = True, language: str = "en") -> dict[str, Any]:
    scores = {"judge_sc": sc, "judge_pq": pq, "judge_overall": (sc * pq) ** 0.5}
    return {"language": language, "edit_type": group, "facts": {"intersection": intersection}, **scores}


def test_groups_weigh_alike_whatever_their_number_and_both_sets_are_printed():
    rows = [gedit_row(name, 4, 9) for name in GROUPS]
    rows += [gedit_row(GROUPS[0], 9, 4, intersection=False)] * 3
    found = gedit_aggregates(rows)
    assert found["en"]["semantics"]["avg_semantics"] == pytest.approx((10 * 4 + (4 + 3 * 9) / 4) / 11)
    assert found["en"]["semantics_intersection"]["avg_semantics"] == 4
    (means, groups) = official_grids("gedit_bench", {"m": found})
    assert means[2] == [
        ["`m`", "en", "full set", "14", "4.34", "8.66", "6.00", ""],
        ["`m`", "en", "intersection", "11", "4.00", "9.00", "6.00", ""],
    ]
    assert groups[2][0][4] == "6.00 (4)"


def test_a_group_without_a_row_leaves_no_mean_and_is_named_and_so_is_a_language_without_any():
    rows = [gedit_row(name, 5, 5) for name in GROUPS[1:]]
    rows.append(gedit_row(GROUPS[0], 5, 5, language="cn") | {"judge_sc": None, "judge_overall": None})
    found = gedit_aggregates(rows)
    assert found["en"]["overall"]["avg_overall"] is None
    assert found["en"]["empty_groups"] == [GROUPS[0]]
    assert found["cn"]["n"] == dict.fromkeys(GROUPS, 0)
    (means, _) = official_grids("gedit_bench", {"m": found})
    assert means[2][0] == ["`m`", "cn", "full set", "0", "", "", "", ", ".join(GROUPS)]


def test_imgedits_two_overalls_are_both_printed_and_an_unscored_type_is_empty():
    scores = {"add": [5.0, 5.0, 5.0], "remove": [1.0]}
    rows = [
        {"item": f"{kind}{at}", "edit_type": kind, "judge_overall": score}
        for kind, some in scores.items()
        for at, score in enumerate(some)
    ]
    ((_, heads, table),) = official_grids("imgedit_bench", {"m": imgedit_aggregates(rows)})
    printed = dict(zip(heads, table[0], strict=True))
    assert (printed["overall, mean of types"], printed["overall, mean of items"], printed["n"]) == ("3.00", "4.00", "4")
    assert (printed["add"], printed["remove"], printed["style"]) == ("5.00 (3)", "1.00 (1)", "")
    assert official_grids("pie_bench", {}) == []
