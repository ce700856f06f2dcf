"""report.html: complete in itself, small, true to the manifests, and unimpressed by what data brings."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SinkError
from pipeline.evaluation.metrics import NAMES
from pipeline.evaluation.report import MAX_CARDS, choose, grade, histogram, write_report
from pipeline.evaluation.results import ResultRef, RunFolder
from pipeline.evaluation.thumbnails import TINT, SheetEntry, contact_sheet, mask_over
from pipeline.writing.rows import FIGURES


class Page(HTMLParser):
    """What a browser would find: tags, their attributes, text outside of styles and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("style", "script") and data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str, cls: str = "") -> list[dict[str, str | None]]:
        return [
            found for name, found in self.tags if name == tag and (not cls or cls in (found.get("class") or "").split())
        ]


def report_of(recipe) -> tuple[str, Page]:
    path = Path(write_report(recipe.sink))
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def a_ref(row: int, psnr: float | None, edit: str = "edit", method: str = "m") -> ResultRef:
    figures = dict.fromkeys(NAMES, None) | {"background_psnr": psnr}
    return ResultRef(file="data/a.parquet", row=row, id=f"{row:05d}", edit=edit, method=method, figures=figures)


def test_every_result_shows_its_input_mask_and_edit_the_worst_first(make_run):
    _, page = report_of(make_run(images=4))
    cards = page.all("article", "card")
    assert len(cards) == 8
    figures = [float(card["data-psnr"]) for card in cards]
    assert figures == sorted(figures)
    pictures = [tag["src"] for tag in page.all("img")]
    assert len(pictures) == 3 * 8
    for source in pictures:
        head, _, data = source.partition(",")
        assert head == "data:image/webp;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 192


def test_the_page_needs_nothing_but_itself_and_fits_a_phone(make_run):
    text, page = report_of(make_run(images=2))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
@pytest.mark.parametrize("include_input", [False, True])
def test_the_input_is_shown_whether_the_run_kept_it_or_not(make_run, file_format, include_input):
    recipe = make_run(images=2, file_format=file_format, include_input=include_input)
    folder = RunFolder(recipe.sink)
    refs = folder.figures(folder.files("data"))
    assert [(ref.id, ref.edit) for ref in refs][:2] == [("faces.tar/0000", "shades"), ("faces.tar/0000", "hat")]
    results = folder.load(refs[::-1])
    assert [result.ref for result in results] == refs[::-1]
    for result in results:
        assert Image.open(io.BytesIO(result.input)).size == (128, 128)
        assert Image.open(io.BytesIO(result.image)).size == (128, 128)
        assert result.request["concepts"]
    _, page = report_of(recipe)
    assert len(page.all("img")) == 3 * 4


def test_what_data_says_is_text_and_never_a_tag(make_run):
    hostile = '</article><script>alert(1)</script><img src=x onerror=alert(2)> "quoted" & <b>bold</b>'
    edits = {"shades": {"concepts": [{"prompt": "<u>sunglasses</u>"}], "target_prompt": "<i>target</i>"}}
    text, page = report_of(make_run(images=2, failing=1, text=hostile, edits=edits))
    assert len(page.all("script")) == 1
    assert not page.all("u")
    assert not page.all("i", "target")
    assert "<script>alert" not in text
    assert any("<u>sunglasses</u>" in found for found in page.texts)
    assert any("alert(1)" in found for found in page.texts)


def test_failures_are_counted_by_stage_and_reason_with_examples(make_run):
    text, page = report_of(make_run(images=4, units=2, failing=2))
    table = text[text.index('id="failures"') : text.index('id="figures"')]
    assert table.count("<tr>") == 2, "a head, and one line: reasons that differ in a number and an id alone are one"
    assert "DecodeError" in table
    assert "faces.tar/0000" in table
    assert ">8<" in table
    assert "&amp; &lt;b&gt;is cut" in table
    assert any("8 of 16 results from 8 images." in found for found in page.texts)


def test_a_run_without_failures_has_no_table_of_them(make_run):
    text, _ = report_of(make_run(images=2))
    assert 'id="failures"' not in text
    assert "Everything that was asked for is here." in text


def test_methods_and_edits_stand_in_a_table_and_can_be_filtered(make_run):
    methods = {"one": {}, "two": {"editing": {"method": "ledits_pp", "mask": "noise"}}}
    text, page = report_of(make_run(images=2, methods=methods))
    assert {card["data-method"] for card in page.all("article")} == {"one", "two"}
    assert {found.get("id") for found in page.all("select")} == {"method", "edit", "order"}
    assert text.count('data-label="Method"') == 4
    assert "mask noise" in text


def test_a_long_run_gives_a_small_page(make_run):
    recipe = make_run(images=40, units=1)
    text, page = report_of(recipe)
    assert len(page.all("article")) == MAX_CARDS
    assert len(text) < 3_000_000
    assert f"{MAX_CARDS} of 80" in text


def test_a_run_that_was_cut_short_is_reported_as_far_as_it_got(make_run):
    recipe = make_run(images=2, summary=False)
    text, _ = report_of(recipe)
    assert "4 results from 2 images. The run is not complete" in text
    Path(recipe.sink.folder, "summary.json").write_text(json.dumps({"complete": False, "images_per_second": 0.0}))
    text, _ = report_of(recipe)
    assert "The run is not complete" in text
    assert "images per second" not in text


def test_files_that_no_manifest_names_are_not_looked_at(make_run):
    recipe = make_run(images=2)
    Path(recipe.sink.folder, "data", "part-stray.parquet").write_bytes(b"torn")
    _, page = report_of(recipe)
    assert len(page.all("article")) == 4


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SinkError, match=r"run\.json is missing"):
        write_report(str(tmp_path))


def test_two_reports_of_one_run_are_equal_and_hold_no_secret(make_run):
    recipe = make_run(images=2)
    first, _ = report_of(recipe)
    second, _ = report_of(recipe)
    assert first == second
    assert "hunter2" not in first


def test_the_worst_are_shown_and_the_rest_is_sampled():
    refs = [a_ref(at, 20 + at * 0.01) for at in range(1000)]
    chosen = choose(refs, 20)
    rows = [ref.row for ref in chosen]
    assert len(set(rows)) == 20
    assert rows[:10] == list(range(10)), "half of the places go to the worst"
    assert max(rows) > 900
    assert any(300 < row < 700 for row in rows)


def test_every_method_and_edit_gets_its_places():
    refs = [a_ref(at, 10.0 + at, edit=f"edit{at % 3}") for at in range(300)]
    refs += [a_ref(1000, None, edit="rare")]
    chosen = choose(refs, 12)
    assert {ref.edit for ref in chosen} == {"edit0", "edit1", "edit2", "rare"}
    assert chosen[-1].edit == "rare", "results without a figure come last"
    assert len(chosen) == 12


def test_few_results_have_no_histogram_and_many_have_one():
    assert histogram([30.0] * 100) is None
    assert histogram([30.0, 31.0]) is None
    drawn = histogram([20.0 + at / 10 for at in range(100)])
    assert drawn is not None
    assert (drawn["low"], drawn["high"]) == (20, 30)
    assert sum(int(re.search(r": (\d+)$", bar["title"])[1]) for bar in drawn["bars"]) == 100


def test_a_background_is_graded_against_what_the_autoencoder_allows():
    def graded(value, best):
        return grade({"background_psnr": value, "reconstruction_psnr": best})

    assert [graded(value, 30.0) for value in (29.0, 25.0, 20.0, None)] == ["good", "fair", "poor", ""]
    assert graded(31.0, None) == "good"


def test_the_mask_is_tinted_and_the_rest_is_faded():
    image = Image.new("RGB", (40, 40), (10, 200, 30))
    mask = np.zeros((80, 80), dtype=bool)
    mask[20:60, 20:60] = True
    shown = np.asarray(mask_over(image, mask)).astype(int)
    assert np.abs(shown[20, 20] - np.array(TINT)).sum() < np.abs(np.array(image.getpixel((20, 20))) - TINT).sum()
    assert (shown[9, 20] == TINT).all(), "a line runs around the mask"
    assert shown[2, 2].min() > 60


def test_a_contact_sheet_sets_its_entries_side_by_side_and_cuts_long_labels():
    image = Image.new("RGB", (30, 20), (10, 200, 30))
    entry = SheetEntry(original=image, mask=np.ones((20, 30), dtype=bool), edited=image, label="+ a hat" * 99)
    one, four = contact_sheet([entry]), contact_sheet([entry] * 4)
    assert four.width > 1.9 * one.width
    assert four.height > 1.6 * one.height
    right_of_its_pictures = np.asarray(one)[:, -20:]
    assert (right_of_its_pictures == 255).all()


def test_the_written_figures_are_the_computed_ones():
    assert FIGURES == NAMES
