"""report.html: complete in itself, small, true to the manifests, and unimpressed by what data brings."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import SinkError
from pipeline.evaluation.metrics import NAMES
from pipeline.looking.report import page as report_module
from pipeline.looking.report.page import write_report
from pipeline.looking.results import RunFolder
from pipeline.recipe import SinkConfig
from pipeline.writing.rows import FIGURES
from tests.places import only_on_s3


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

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        """Images with a source; those of the zoom get theirs from the script."""
        return [found for found in self.all("img") if "src" in found]

    @property
    def results(self) -> list[tuple[str | None, str | None, str | None]]:
        return [(tile["data-edit"], tile["data-method"], tile["data-outcomes"]) for tile in self.all("figure", "tile")]


def report_of(recipe) -> tuple[str, Page]:
    path = Path(write_report(recipe.sink))
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


TWO_METHODS = {"one": {}, "two": {"editing": {"method": "ledits_pp", "mask": "noise"}}}


def test_all_edits_and_methods_of_an_image_stand_in_one_row_beside_its_input(make_run):
    text, page = report_of(make_run(images=3, methods=TWO_METHODS))
    cards = text.split("<article")[1:]
    assert len(cards) == 3
    for card in cards:
        shown = Page(card)
        assert [(edit, method) for edit, method, _ in shown.results] == [
            ("hat", "one"),
            ("hat", "two"),
            ("shades", "one"),
            ("shades", "two"),
        ]
        assert len(shown.all("figure", "input")) == 1
        masks = [image for image in shown.pictures if image["class"] == "mask"]
        assert len(masks) + shown.texts.count("no mask") == 4
        assert len(masks) in (2, 4), "a face that wears sunglasses already gives its second edit nothing to do"
    for picture in page.pictures:
        head, _, data = picture["src"].partition(",")
        assert head in ("data:image/webp;base64", "data:image/png;base64")
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 128


def test_every_picture_says_what_is_seen(make_run):
    _, page = report_of(make_run(images=1, text="a yellow face"))
    masks = [picture["alt"] for picture in page.pictures if picture["class"] == "mask"]
    said = [picture["alt"] for picture in page.pictures]
    assert said[0] == "input: 0000, a yellow face"
    assert "edited: a red hat added, a smile removed, 0000" in said
    assert "edited: sunglasses added, 0000" in said
    assert masks == ["mask: 1 % of the picture"], "of the mouth; hat and sunglasses were there already"


def test_images_stand_in_the_order_of_their_worst_score(make_run):
    text, _ = report_of(make_run(images=4))
    worst = [
        min(float(tile["data-score"]) for tile in Page(card).all("figure", "tile"))
        for card in text.split("<article")[1:]
    ]
    assert worst == sorted(worst)
    assert worst[0] < worst[-1]


def test_an_edit_that_did_nothing_is_said_to_have_done_nothing(make_run):
    # Some of the drawn faces wear sunglasses already: for them the drawn edit is the input again.
    _, page = report_of(make_run(images=6))
    by_outcome = {outcome for edit, _, outcome in page.results if edit == "shades"}
    assert any("nothing-changed" in (found or "") for found in by_outcome)
    for tile in page.all("figure", "tile"):
        nothing = "nothing-changed" in (tile["data-outcomes"] or "")
        assert (float(tile["data-score"]) == 0) == nothing
        assert (float(tile["data-change"]) < 40) == nothing


def test_the_page_needs_nothing_but_itself_and_fits_a_phone(make_run):
    text, page = report_of(make_run(images=2, failing=1))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in text


def test_without_a_script_every_result_is_there_and_no_control_that_does_nothing(make_run):
    _, page = report_of(make_run(images=3, failing=1))
    assert not [card for card in page.all("article") if "hidden" in card]
    assert len(page.results) == 6
    for name in ("tools", "state", "pager"):
        (found,) = [tag for tag in page.all("div") if tag.get("id") == name]
        assert "hidden" in found


@pytest.mark.parametrize("file_format", ["parquet", "webdataset"])
@pytest.mark.parametrize("include_input", [False, True])
def test_the_input_is_shown_whether_the_run_kept_it_or_not(make_run, file_format, include_input):
    recipe = make_run(images=2, file_format=file_format, include_input=include_input)
    folder = RunFolder(recipe.sink)
    refs = folder.figures(folder.spans("data"))
    assert [(ref.id, ref.edit) for ref in refs][:2] == [("faces.tar/0000", "hat"), ("faces.tar/0000", "shades")]
    results = folder.load(refs[::-1])
    assert [result.ref for result in results] == refs[::-1]
    for result in results:
        assert Image.open(io.BytesIO(result.input)).size == (128, 128)
        assert Image.open(io.BytesIO(result.image)).size == (128, 128)
        assert result.request["concepts"]
    _, page = report_of(recipe)
    assert len([picture for picture in page.pictures if picture["class"] == "pic"]) == 2 * 3


def test_what_data_says_is_text_and_never_a_tag(make_run):
    hostile = '</article><script>alert(1)</script><img src=x onerror=alert(2)> "quoted" & <b>bold</b>'
    edits = {"shades": {"concepts": [{"prompt": "<u>sunglasses</u>"}], "target_prompt": "<i>target</i>"}}
    text, page = report_of(make_run(images=2, failing=1, text=hostile, edits=edits))
    assert len(page.all("script")) == 1
    assert not page.all("u")
    assert "<i>target" not in text
    assert "<script>alert" not in text
    assert any("<u>sunglasses</u>" in found for found in page.texts)
    assert any("alert(1)" in found for found in page.texts)


def test_control_characters_of_captions_are_spelled_out(make_run):
    text, page = report_of(make_run(images=1, text="red\x1b[2J\u202egnp.exe\u200b, 👩\u200d🎤"))
    assert not set("\x1b\u202e\u200b") & set(text)
    assert "red\\x1b[2J\\u202egnp.exe\\u200b, 👩\u200d🎤" in page.texts


def test_long_names_may_break_at_their_separators_alone(make_run):
    text, _ = report_of(make_run(images=1))
    assert "faces.<wbr>tar/<wbr>0000" in text
    assert "overflow-wrap: anywhere" not in text
    assert "word-break" not in text


def test_failures_are_counted_by_stage_and_reason_with_examples_and_shown_with_their_image(make_run):
    text, page = report_of(make_run(images=4, units=2, failing=2))
    table = text[text.index('id="failures"') : text.index('id="figures"')]
    assert table.count("<tr>") == 2, "a head, and one line: reasons that differ in a number and an id alone are one"
    assert "DecodeError" in table
    assert "faces.<wbr>tar/<wbr>0000" in table
    assert ">8<" in table
    assert "&amp; &lt;b&gt;is cut" in table
    assert any("8 of 16 results from 8 images." in found for found in page.texts)
    assert [outcome for _, _, outcome in page.results].count("failed") == 8
    assert any("faces.tar/0001 ends after 101 bytes" in found for found in page.texts)


def test_a_run_without_failures_has_no_table_of_them(make_run):
    text, _ = report_of(make_run(images=2))
    assert 'id="failures"' not in text
    assert "Everything that was asked for is here." in text


def test_methods_and_edits_are_compared_and_filtered(make_run):
    text, page = report_of(make_run(images=2, methods=TWO_METHODS))
    assert {method for _, method, _ in page.results} == {"one", "two"}
    assert {found.get("id") for found in page.all("select")} == {"method", "edit", "concept", "outcome", "order"}
    assert text.count('data-label="Method"') == 4
    assert "mask noise" in text


def test_a_run_of_more_than_a_page_goes_on_in_others_and_every_result_is_on_one(make_run, monkeypatch):
    monkeypatch.setattr(report_module, "PAGE_RESULTS", 5)
    recipe = make_run(images=5, failing=1)
    folder = Path(recipe.sink.folder)
    text, first = report_of(recipe)
    others = sorted((folder / "report").glob("page-*.html"))
    pages = [first, *(Page(path.read_text(encoding="utf-8")) for path in others)]
    assert [path.name for path in others] == ["page-0002.html", "page-0003.html"]
    assert [len(page.results) for page in pages] == [4, 4, 2]
    hrefs = [link["href"] for link in first.all("a") if "title" in link]
    assert hrefs == ["report/page-0002.html", "report/page-0003.html"]
    assert [link["href"] for link in pages[1].all("a") if "title" in link] == ["../report.html", "page-0003.html"]
    assert first.all("script")[0]["src"] == "report/index.js"
    assert pages[1].all("script")[0]["src"] == "index.js"
    entries = json.loads((folder / "report" / "index.js").read_text().partition("=")[2].rstrip("; \n"))
    assert [entry[:4] for entry in entries] == [
        [number, *result] for number, page in enumerate(pages, 1) for result in page.results
    ]
    assert 'id="failures"' in text
    assert not any('id="failures"' in path.read_text(encoding="utf-8") for path in others)


def test_pages_of_an_earlier_longer_report_are_removed(make_run, monkeypatch):
    recipe = make_run(images=4)
    monkeypatch.setattr(report_module, "PAGE_RESULTS", 2)
    report_of(recipe)
    assert len(list(Path(recipe.sink.folder, "report").iterdir())) == 4
    monkeypatch.setattr(report_module, "PAGE_RESULTS", 100)
    report_of(recipe)
    assert not list(Path(recipe.sink.folder, "report").iterdir())


@only_on_s3
def test_on_an_object_store_pages_come_and_go_as_on_a_disk(make_run, place, monkeypatch):
    made = make_run(images=3)
    folder = place.new()
    shutil.copytree(made.sink.folder, place.root / folder)
    sink = SinkConfig(folder=f"{place.url}/{folder}", storage_options=place.storage_options)
    monkeypatch.setattr(report_module, "PAGE_RESULTS", 2)
    assert write_report(sink) == f"{place.url}/{folder}/report.html"
    place.settle()
    pages = place.root / folder / "report"
    assert sorted(path.name for path in pages.iterdir()) == ["index.js", "page-0002.html", "page-0003.html"]
    monkeypatch.setattr(report_module, "PAGE_RESULTS", 4)
    write_report(sink)
    place.settle()
    assert sorted(path.name for path in pages.iterdir()) == ["index.js", "page-0002.html"]


def test_a_long_run_gives_a_bounded_report_and_all_of_it_where_all_is_asked_for(make_run, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_RESULTS", 12)
    recipe = make_run(images=10)
    folder = recipe.sink.folder
    bounded = CliRunner().invoke(app, ["report", folder, "--results", "12"])
    assert bounded.exit_code == 0, bounded.output
    page = Page(Path(folder, "report.html").read_text(encoding="utf-8"))
    assert len(page.results) == 12
    assert any("12 of 20 results" in found for found in page.texts)
    assert any("--results all" in found for found in page.texts)
    assert CliRunner().invoke(app, ["report", folder, "--results", "all"]).exit_code == 0
    page = Page(Path(folder, "report.html").read_text(encoding="utf-8"))
    assert len(page.results) == 20
    assert not any("--results all" in found for found in page.texts)


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_number_of_results_that_is_none_is_refused(value, tmp_path):
    refused = CliRunner().invoke(app, ["report", str(tmp_path), "--results", value])
    assert refused.exit_code == 2
    assert "above 0, or all" in refused.output


def test_a_page_grows_by_few_bytes_per_result(make_run):
    few, many = (len(report_of(make_run(images=images))[0]) for images in (2, 12))
    assert (many - few) / 20 < 6_500, "so that 400 results are below 3 MB; photographs take about three times as much"


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
    Path(recipe.sink.folder, "_parts", "data", "faces-3fa2b1c4", "00007-00000001.parquet").write_bytes(b"torn")
    _, page = report_of(recipe)
    assert len(page.results) == 4


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SinkError, match=r"run\.json is missing"):
        write_report(str(tmp_path))


def test_two_reports_of_one_run_are_equal_and_hold_no_secret(make_run):
    recipe = make_run(images=2)
    first, _ = report_of(recipe)
    second, _ = report_of(recipe)
    assert first == second
    assert "hunter2" not in first


def test_the_written_figures_are_the_computed_ones():
    assert FIGURES == NAMES
