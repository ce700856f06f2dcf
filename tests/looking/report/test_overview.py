"""The report's numbers: means, shares, order."""

from __future__ import annotations

from pipeline.evaluation.verdict import judge
from pipeline.looking.report.overview import RunCounts, bar, drawing, method_lines, share_text, tiles
from pipeline.looking.results import ResultRef
from pipeline.writing.merged import Span

COUNTS = RunCounts(done=100, failed=25, images=50, images_per_second=2.0, complete=True)


def a_result(edit_change: float | None, rest_change: float | None, method: str = "m", number: int = 0):
    figures = {"edit_change": edit_change, "rest_change": rest_change}
    ref = ResultRef(
        span=Span("data/f.parquet", "f-00000", 1000),
        row=number,
        id=f"{number}",
        edit="edit",
        method=method,
        figures=figures,
    )
    return ref, judge(figures), None


def test_a_method_that_does_nothing_is_never_the_best():
    scored = [a_result(0.0, 0.0, "nothing"), a_result(90.0, 12.0, "rough"), a_result(90.0, 1.0, "good")]
    lines = method_lines(scored, [{"method": "failing", "edit": "edit"}])
    assert [(line["method"], line["failed"]) for line in lines] == [
        ("good", 0),
        ("rough", 0),
        ("nothing", 0),
        ("failing", 1),
    ]
    assert [line["happened"] for line in lines] == ["100 %", "100 %", "0 %", None]
    assert [line["stayed"] for line in lines] == ["100 %", "0 %", "100 %", None]


def test_means_are_over_what_is_defined():
    scored = [a_result(90.0, 1.0), a_result(60.0, None), a_result(None, None)]
    (line,) = method_lines(scored, [])
    assert (line["edit_change"], line["rest_change"], line["mask_share"], line["count"]) == (75.0, 1.0, None, 3)


def test_shares_are_all_or_none_only_where_they_are():
    assert [share_text(part, 1000) for part in (0, 1, 500, 999, 1000)] == ["0 %", "1 %", "50 %", "99 %", "100 %"]


def test_the_bar_shares_out_all_that_was_asked_for():
    parts = bar(COUNTS, [a_result(90.0, 1.0)] * 3 + [a_result(0.0, 0.0)])
    assert [(part["label"], part["weight"], part["share"]) for part in parts] == [
        ("edit done", 75.0, "60 %"),
        ("nothing changed", 25.0, "20 %"),
        ("failed", 25.0, "20 %"),
    ]
    assert bar(RunCounts(done=0, failed=0, images=0, images_per_second=None, complete=True), []) == []


def test_the_numbers_at_the_top_answer_both_questions():
    found = {tile["label"]: tile["value"] for tile in tiles(COUNTS, [a_result(90.0, 9.0), a_result(0.0, 0.0)])}
    assert found["edit happened"] == "50 %"
    assert found["rest stayed"] == "50 %"
    assert (found["results"], found["failed"], found["images per second"]) == ("100", "25", "2")


def test_the_drawing_sets_good_results_to_the_top_right():
    assert drawing([a_result(90.0, 1.0)] * 7) is None
    drawn = drawing([a_result(0.0, 0.0), a_result(200.0, 0.5), a_result(200.0, 99.0)] * 3)
    assert drawn is not None
    nothing, good, lost = drawn["dots"][:3]
    assert (nothing["left"], nothing["top"], nothing["grade"]) == (0, 0, "poor")
    assert good["left"] > drawn["nothing"]
    assert (good["grade"], good["top"] < 20) == ("good", True)
    assert (lost["top"], lost["grade"]) == (100, "poor")
