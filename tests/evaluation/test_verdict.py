"""Both questions of a result, and the score in which they meet."""

from __future__ import annotations

import pytest

from pipeline.evaluation.verdict import CLEAR, DRIFTED, HAPPENED, KEPT, LOST, judge


def judged(edit: float | None, rest: float | None, gain: float | None = None):
    return judge({"edit_change": edit, "rest_change": rest}, gain)


def test_nothing_done_scores_nothing_however_well_the_rest_was_kept():
    nothing = judged(0.0, 0.0)
    assert (nothing.edit, nothing.rest, nothing.score) == ("nothing changed", "kept", 0.0)
    assert nothing.score < judged(HAPPENED + 1, DRIFTED).score
    assert judged(HAPPENED - 0.1, 0.0).score == 0


def test_a_background_at_the_autoencoders_limit_is_perfect():
    assert judged(CLEAR, 0.0).score == judged(CLEAR, KEPT).score == 100
    assert judged(CLEAR, 0.0).rest_grade == "good"


def test_both_questions_lower_the_score():
    assert judged(CLEAR, 10).score < judged(CLEAR, 5).score < 100
    assert judged(HAPPENED, 0).score < judged(CLEAR, 0).score
    assert judged(CLEAR, LOST + 1).score == 0


def test_between_nothing_and_a_clear_change_an_edit_is_faint_and_scores_in_between():
    faint = judged((HAPPENED + CLEAR) / 2, 0)
    assert (faint.edit, faint.edit_grade, faint.score) == ("faint", "fair", pytest.approx(50))
    assert judged(CLEAR, 0).edit == "done"
    assert judged(HAPPENED, 0).edit == "faint"


def test_colours_follow_the_levels():
    assert [judged(90, rest).rest_grade for rest in (0, DRIFTED, DRIFTED + 1, None)] == ["good", "fair", "poor", ""]
    assert [judged(edit, 0).edit_grade for edit in (0, 90, None)] == ["poor", "good", ""]


def test_an_edit_that_moves_away_from_its_text_is_off_target_and_scores_half():
    assert judged(90, 0, gain=2.0).edit == "done"
    assert judged(90, 0, gain=-0.1).edit == judged(90, 0, gain=0.0).edit == "off target"
    assert judged(90, 0, gain=-0.1).score == pytest.approx(judged(90, 0).score / 2)
    assert judged(0, 0, gain=5.0).edit == "nothing changed"


def test_without_figures_nothing_is_said_and_without_a_rest_the_edit_decides():
    assert judge({}).score is None
    assert judged(None, 1.0).score is None
    assert judged(CLEAR, None).score == 100
