"""Which images a report shows, and in which order."""

from __future__ import annotations

from pipeline.evaluation.verdict import Verdict
from pipeline.looking.report.selection import choose, images_of, key_of, pages_of, spread, worst_first
from pipeline.looking.results import ResultRef
from pipeline.writing.merged import Span


def a_ref(image: int, edit: str = "edit", method: str = "m", row: int = 0) -> ResultRef:
    return ResultRef(
        span=Span(f"{edit}-{method}", "f-00000", 1000),
        row=1000 * row + image,
        id=f"{image:05d}",
        edit=edit,
        method=method,
        figures={},
    )


def scored(refs, score):
    return {key_of(ref): Verdict(edit=None, rest=None, score=score(ref)) for ref in refs}


def test_all_results_of_an_image_stand_in_one_row_with_what_failed_of_it():
    refs = [a_ref(1, "hat"), a_ref(2, "hat"), a_ref(1, "shades"), a_ref(1, "hat", "other")]
    failures = [{"id": "00002", "edit": "shades"}, {"id": "00009", "edit": "hat"}]
    rows = images_of(refs, failures)
    assert [(row.id, len(row.refs), len(row.failures)) for row in rows] == [
        ("00001", 3, 0),
        ("00002", 1, 1),
        ("00009", 0, 1),
    ]


def test_an_image_stands_where_its_worst_result_puts_it_and_ties_go_by_the_mean():
    scores = {("1", "a"): 90, ("1", "b"): 0, ("2", "a"): 50, ("2", "b"): 50, ("3", "a"): 10, ("3", "b"): 0}
    refs = [a_ref(int(image), edit) for image, edit in scores]
    rows = images_of(refs, [{"id": "failed"}])
    ordered = worst_first(rows, scored(refs, lambda ref: scores[ref.id[-1], ref.edit]))
    assert [row.id for row in ordered] == ["00003", "00001", "00002", "failed"]


def test_the_worst_are_chosen_and_the_rest_is_sampled():
    refs = [a_ref(at) for at in range(1000)]
    rows = choose(images_of(refs, []), scored(refs, lambda ref: float(ref.id) / 10), 20)
    places = sorted(int(row.id) for row in rows)
    assert len(places) == 20
    assert places[:10] == list(range(10)), "half of the places go to the worst"
    assert max(places) > 800
    assert any(300 < place < 700 for place in places)


def test_every_method_and_edit_gets_its_places():
    refs = [a_ref(at, edit=f"edit{at % 3}") for at in range(300)] + [a_ref(1000, edit="rare")]
    rows = choose(images_of(refs, []), scored(refs, lambda ref: 50.0), 12)
    assert {ref.edit for row in rows for ref in row.refs} == {"edit0", "edit1", "edit2", "rare"}


def test_rows_are_never_cut_neither_by_the_choice_nor_by_a_page():
    refs = [a_ref(at, edit) for at in range(20) for edit in ("a", "b", "c")]
    rows = images_of(refs, [])
    chosen = choose(rows, scored(refs, lambda ref: 1.0), 10)
    assert [row.size for row in chosen] == [3, 3, 3]
    pages = pages_of(rows, 7)
    assert [sum(row.size for row in page) for page in pages] == [6] * 10
    assert [row for page in pages for row in page] == rows
    assert [len(page) for page in pages_of(rows, 2)] == [1] * 20, "an image with more than a page is a page"
    assert pages_of([], 7) == [[]]


def test_a_spread_is_even():
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 4) == [1, 2]
