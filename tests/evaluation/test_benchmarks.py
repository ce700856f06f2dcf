"""Benchmarks as they are published, and as they should not be: every item counts, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.evaluation.benchmarks import drawn, gedit_bench, imgedit_bench, pie_bench
from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.benchmarks.pie_bench import blend_words, decode_mask, is_balanced, without_brackets
from pipeline.models.demo.world import Scene, draw
from pipeline.reading.decode import decode
from pipeline.reading.decode import decode_mask as decode_picture_of_mask
from pipeline.writing.rows import encode_png

GOLDEN = Path(__file__).parents[1] / "golden"
ENTRY: dict[str, Any] = {
    "image_path": "1_change_object_80/1_artificial/a.png",
    "original_prompt": "a [cat] on a mat",
    "editing_prompt": "a [dog] on a mat",
    "editing_instruction": "Make it a dog",
    "editing_type_id": "1",
    "blended_word": "cat dog",
    "mask": [0, 4],
}


def pie(folder: Path, entries: dict[str, Any]) -> Folder:
    picture = folder / "annotation_images" / ENTRY["image_path"]
    picture.parent.mkdir(parents=True)
    picture.write_bytes(encode_png(np.zeros((512, 512, 3), dtype=np.uint8)))
    (folder / "mapping_file.json").write_text(json.dumps(entries))
    return Folder(str(folder))


def test_runs_overlap_once_are_cut_at_the_end_and_the_border_counts():
    mask = decode_mask([1024 + 5, 3, 1024 + 6, 4, 512 * 511 + 100, 10_000])
    inside = np.zeros((512, 512), dtype=bool)
    inside[2, 5:10] = True
    inside[[0, -1], :] = inside[:, [0, -1]] = True
    assert np.array_equal(mask, inside)
    assert decode_mask([]).sum() == 2044


@pytest.mark.parametrize(
    ("runs", "words"),
    [([1, 2, 3], "3 numbers"), ([-1, 2], "whole number"), ([1.5, 2], "whole number"), ("12", "not a list")],
)
def test_a_mask_that_is_none_is_refused(runs, words):
    with pytest.raises(ValueError, match=words):
        decode_mask(runs)


def test_only_the_two_characters_of_the_marks_go():
    assert without_brackets("a [red] (old) house]") == "a red (old) house"
    assert is_balanced("a [b] [c]")
    assert not is_balanced("a [b")
    assert not is_balanced("]a[")


def test_blend_words_are_those_of_the_prompts_or_none():
    words = blend_words("cat Dog", "a cat, here", "a dog")
    assert words is not None
    assert (words.source, words.target) == (("cat",), ("Dog",))
    assert blend_words("cat", "a cat", "a dog") is None
    assert blend_words("tiger dog", "a cat", "a dog") is None


def test_whatever_is_wrong_with_an_item_it_counts_and_says_so(tmp_path):
    entries = {
        "good": ENTRY,
        "odd mask": ENTRY | {"mask": [1, 2, 3]},
        "no picture": ENTRY | {"image_path": "0_random_140/b.png"},
        "way out": ENTRY | {"image_path": "../../secret.png"},
        "no entry": [],
        "no prompt": {key: value for key, value in ENTRY.items() if key != "editing_prompt"},
        "brackets": ENTRY | {"original_prompt": "a [cat on a mat"},
        "other words": ENTRY | {"blended_word": "lion dog"},
        "other type": ENTRY | {"editing_type_id": "2"},
    }
    items = {item.key: item for item in pie_bench.items_of(pie(tmp_path, entries))}
    assert list(items) == list(entries)
    assert {key: item.excluded for key, item in items.items() if item.problem} == {
        "odd mask": "bad_mask",
        "no picture": "missing_image",
        "way out": "bad_path",
        "no entry": "bad_entry",
        "no prompt": "bad_entry",
    }
    assert items["brackets"].notes == ("brackets_unbalanced",)
    assert items["other words"].notes == ("blend_words_not_in_prompts",)
    assert items["other words"].request.blend_words is None
    assert items["other type"].notes == ("type_is_not_the_folders",)
    request = items["good"].request
    assert (request.source_prompt, request.target_prompt) == ("a cat on a mat", "a dog on a mat")
    assert [concept.prompt for concept in request.concepts] == ["dog"]


def test_the_subset_of_620_leaves_out_style(tmp_path):
    entries = {"a": ENTRY, "b": ENTRY | {"editing_type_id": "9"}}
    assert [item.key for item in pie_bench.items_of(pie(tmp_path, entries), "no_style")] == ["a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no mapping_file.json"),
        ("{", "is no JSON"),
        ("{}", "holds no items"),
        ('{"a": {}}', "another version"),
    ],
)
def test_a_folder_that_is_no_pie_bench_is_told(tmp_path, text, words):
    if text is not None:
        (tmp_path / "mapping_file.json").write_text(text)
    with pytest.raises(SourceError, match=words):
        list(pie_bench.items_of(Folder(str(tmp_path))))


def test_gedit_bench_is_read_from_parquet_and_arrow_alike_and_by_language():
    parquet, arrow = (
        list(gedit_bench.items_of(Folder(str(GOLDEN / "gedit_mini" / name)))) for name in ("dataset", "dataset_arrow")
    )
    assert parquet == arrow
    chinese = list(gedit_bench.items_of(Folder(str(GOLDEN / "gedit_mini" / "dataset")), ("zh",)))
    assert {item.language for item in chinese} == {"cn"}
    assert 0 < len(chinese) < len(parquet)


def test_a_table_of_other_columns_is_no_gedit_bench(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="needed are key, task_type"):
        list(gedit_bench.items_of(Folder(str(tmp_path))))


def gedit_row(**more: Any) -> dict[str, Any]:
    return {
        "key": "a",
        "task_type": "ps_human",
        "instruction": "Smile.",
        "instruction_language": "en",
        "source_image": {"bytes": b"picture", "path": None},
        **more,
    }


def test_whatever_is_wrong_with_a_row_of_gedit_bench_it_counts_and_says_so(tmp_path):
    import pyarrow as pa

    rows = [
        gedit_row(),
        gedit_row(instruction="Again."),
        gedit_row(instruction_language="cn"),
        gedit_row(key="../../out"),
        gedit_row(key="b", task_type="ps_dog"),
        gedit_row(key="c", instruction=None),
        gedit_row(key="d", instruction_language="fr"),
        gedit_row(key="e", source_image={"bytes": None, "path": "x.png"}),
        gedit_row(key=None),
        gedit_row(key="f" * 300),
    ]
    table = pa.Table.from_pylist(rows)
    for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):  # `datasets` leaves such beside the data
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    items = list(gedit_bench.items_of(Folder(str(tmp_path))))
    assert [item.excluded for item in items] == [
        "",
        "duplicate_key",
        "",
        "bad_key",
        "unknown_type",
        "no_instruction",
        "unknown_language",
        "missing_image",
        "bad_key",
        "bad_key",
    ]
    assert len({item.key for item in items}) == len(items)
    english = list(gedit_bench.items_of(Folder(str(tmp_path)), ("en",)))
    assert len(english) == len(items) - 1, "a row of no language is in every choice of languages"


def test_whatever_is_wrong_with_an_entry_of_imgedit_bench_it_counts_and_says_so(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"picture")
    good = {"id": "a.jpg", "prompt": "Add a hat.", "edit_type": "add"}
    entries: dict[str, Any] = {
        "1": good,
        "2": good | {"id": "b.jpg"},
        "3": good | {"id": "../../secret.jpg"},
        "4": good | {"edit_type": "dance"},
        "5": good | {"prompt": " "},
        "6": {"id": "a.jpg"},
        "../7": good,
    }
    (tmp_path / "basic_edit.json").write_text(json.dumps(entries))
    items = list(imgedit_bench.items_of(Folder(str(tmp_path)), "pictures"))
    classes = ["", "missing_image", "bad_path", "unknown_type", "no_instruction", "bad_entry", "bad_key"]
    assert [item.excluded for item in items] == classes


def test_imgedits_other_suites_are_refused_and_its_items_keep_their_order():
    items = list(imgedit_bench.items_of(Folder(str(GOLDEN / "imgedit_mini"))))
    assert [item.key for item in items[:3]] == ["947", "182", "816"]
    assert not any(item.problem for item in items)


def test_an_imgedit_suite_without_types_is_told(tmp_path):
    (tmp_path / "basic_edit.json").write_text(json.dumps({"1": {"id": "a.jpg", "prompt": "x"}}))
    with pytest.raises(SourceError, match="no basic suite"):
        list(imgedit_bench.items_of(Folder(str(tmp_path))))


def test_drawn_items_change_what_they_say_and_more_items_change_none():
    few, many = list(drawn.items_of(10, size=64)), list(drawn.items_of(20, size=64))
    assert many[:10] == few
    assert [item.edit_type for item in few] == [str(kind) for kind in range(10)]
    for item in few:
        assert item.image is not None
        assert item.truth is not None
        assert item.region is not None
        before, after = decode(item.image, 10**6)[0], decode(item.truth, 10**6)[0]
        region = decode_picture_of_mask(item.region, 10**6, 1, (64, 64)) > 127
        assert np.array_equal((before != after).any(axis=-1), region)
        assert region.any()
        assert np.array_equal(draw(Scene(**item.facts["after"]), 64), after)
        words = item.request.blend_words
        assert words is not None
        assert all(word in item.request.target_prompt for word in words.target)
        assert all(word in item.request.source_prompt for word in words.source)
