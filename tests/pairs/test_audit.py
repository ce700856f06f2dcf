"""`shardedit audit`: what is planted is found by its name, in every layout, here and on Ray; and nothing else."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from benchmarks.pairs import decoded, jpeg, sources
from pipeline.cli import app
from pipeline.errors import RecipeError, SourceError
from pipeline.pairs.checks import COPY_MEAN
from pipeline.pairs.layouts import layout_of_columns, layout_of_members, layout_of_options, split_of
from tests.pairs.conftest import box, edited, found_in, picture, png, row


def test_a_sound_set_has_no_finding(write_set, audited):
    result = audited(write_set([row(number) for number in range(6)]))
    assert result.findings == ()
    assert (result.layout, result.rows, result.exit_code) == ("ultraedit", 6, 0)
    assert set(result.verdicts) <= {"aligned", "undetermined"}
    assert result.verdicts["aligned"] >= 5


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"edited_image": None}, "missing"),
        ({"source_image": None}, "missing"),
        ({"mask_image": None}, "missing"),
        ({"edited_image": jpeg(edited(0), 92)[:900]}, "broken"),
        ({"source_image": b""}, "broken"),
        ({"edited_image": b"<html>404</html>"}, "broken"),
        ({"edited_image": jpeg(picture(0), 92)}, "unchanged"),
        ({"edited_image": jpeg(picture(0), 75)}, "unchanged"),
        ({"edited_image": jpeg(np.roll(edited(0), 2, axis=1), 92)}, "misaligned"),
        ({"edited_image": jpeg(edited(0)[:100], 92)}, "size_differs"),
        ({"edited_image": jpeg(edited(47), 92)}, "alignment_unrelated"),
        ({"mask_image": png(~box(0))}, "mask_misses_change"),
        ({"mask_image": png(np.zeros((128, 128), dtype=bool))}, "mask_empty"),
        ({"mask_image": png(np.ones((128, 128), dtype=bool))}, "mask_full"),
        ({"mask_image": png(box(0)[:64])}, "mask_size"),
        ({"mask_image": b"no mask"}, "mask_broken"),
        ({"edit_prompt": "  "}, "prompt_empty"),
        ({"edit_prompt": None}, "prompt_empty"),
        ({"edit_prompt": "<instruction>"}, "prompt_placeholder"),
        ({"edit_prompt": "Make the cafÃ© blue"}, "prompt_mojibake"),
        ({"edit_prompt": "Make it (blue"}, "prompt_brackets"),
    ],
)
def test_a_defect_of_one_row_is_found_there(write_set, audited, changes, finding):
    found = found_in(audited(write_set([row(0, **changes), row(1)])))
    assert finding in found.pop("0")
    assert found == {}


def crop(name, side):
    return sources()[name][20 : 20 + side, 30 : 30 + side]


def test_a_mask_of_everything_but_a_small_edit_is_found_though_nothing_fits_outside_of_it(write_set, audited):
    source = crop("coffee.png", 288)
    result, mask = source.copy(), np.zeros((288, 288), dtype=bool)
    mask[60:92, 100:132] = True
    result[mask] = 255 - result[mask]
    pair = row(0, source_image=jpeg(source, 92), edited_image=jpeg(result, 92))
    found = found_in(audited(write_set([pair | {"mask_image": png(~mask)}, row(1)])))
    assert found == {"0": {"mask_misses_change"}}


def test_a_copy_of_gravel_is_a_copy_though_its_grain_suffers(write_set, audited):
    source = jpeg(crop("gravel.png", 288), 95)
    again = jpeg(decoded(source), 65)
    assert np.abs(decoded(again).astype(float) - decoded(source)).mean() > COPY_MEAN
    pair = row(0, source_image=source, edited_image=again, mask_image=png(np.eye(288, dtype=bool)))
    assert found_in(audited(write_set([pair, row(1)])))["0"] == {"unchanged"}


def test_doubled_rows_and_ids_are_told_from_variants(write_set, audited):
    other = jpeg(255 - edited(2), 92)
    rows = [row(0), row(0, idx=5), row(1), row(1, **{k: row(7)[k] for k in row(7) if k != "idx"}), row(2)]
    found = found_in(audited(write_set([*rows, row(2, idx=6, edited_image=other, mask_image=png(~box(2)))])))
    assert found["0"] == found["5"] == {"duplicate_pair"}
    assert found["1"] == {"duplicate_id"}
    assert "variant" in found["2"]
    assert not {"duplicate_pair", "duplicate_id"} & (found["2"] | found["6"])


def swap(one):
    return one | {"source_image": one["edited_image"], "edited_image": one["source_image"]}


def test_an_exchanged_pair_is_told_by_the_other_edits_of_its_source(write_set, audited):
    def edit_of(idx, at):
        result = picture(3).copy()
        result[at : at + 20] = 255 - result[at : at + 20]
        mask = np.zeros((128, 128), dtype=bool)
        mask[at : at + 20] = True
        return row(3, idx=idx, edited_image=jpeg(result, 92), mask_image=png(mask), edit_prompt=f"Invert {at}.")

    found = found_in(audited(write_set([edit_of(0, 0), edit_of(1, 25), swap(edit_of(2, 50)), row(4, idx=3)])))
    assert found == {"2": {"swapped"}}


def test_a_chain_of_turns_is_no_exchange(write_set, audited):
    second = picture(0).copy()
    second[70:90] = 255 - second[70:90]
    first, last = row(0), row(1, source_image=row(0)["edited_image"], edited_image=jpeg(second, 92), mask_image=None)
    rows = [
        {"img_id": "a", "turn_index": turn, "source_img": one["source_image"], "target_img": one["edited_image"]}
        for turn, one in enumerate((first, last), 1)
    ]
    folder = write_set([{**one, "instruction": "go on"} for one in rows])
    assert not {"swapped", "swapped_suspect"} & set(audited(folder).counts)


def test_rows_that_slipped_by_one_are_found_from_the_first_on(write_set, audited):
    rows = [row(number) for number in range(12)]
    for number in range(5, 11):
        rows[number]["edited_image"] = row(number + 1)["edited_image"]
    (one,) = [one for one in audited(write_set(rows)).findings if one.finding == "off_by_one"]
    assert (one.index, one.severity) == (5, "error")
    assert "source i + 1; 6 rows" in one.detail


def test_a_source_in_two_splits_leaks(write_set, audited):
    write_set([row(0), row(1)], "train-00000-of-00001.parquet")
    found = found_in(audited(write_set([row(2), row(0, idx=3, edited_image=jpeg(edited(0), 60))], "test-0.parquet")))
    assert found["0"] == {"split_leak", "variant"}
    assert "1" not in found
    assert "2" not in found


def test_the_rows_and_the_report_say_every_finding_and_a_second_look_writes_the_same_bytes(
    tmp_path, write_set, audited
):
    folder = write_set([row(0), row(1, edited_image=None), row(2, edit_prompt="<script>alert(1)</script>" + "x" * 9)])
    audited(folder)
    first = {path.name: path.read_bytes() for path in (tmp_path / "audit").iterdir()}
    rows = pq.read_table(tmp_path / "audit" / "rows-00000.parquet").to_pylist()
    assert [(one["key"], one["finding"]) for one in rows] == [("0", ""), ("1", "missing"), ("2", "")]
    assert rows[0]["align_verdict"] == "aligned"
    assert json.loads(first["audit.json"])["findings"]["missing"]["count"] == 1
    page = first["index.html"].decode()
    assert "missing" in page
    assert "<script>alert" not in page
    audited(folder)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "audit").iterdir()}


def test_a_sample_is_the_same_in_every_run_and_has_an_interval(write_set, audited):
    folder = write_set([row(number, edit_prompt="") for number in range(30)])
    one, other = (audited(folder, sample=10) for _ in range(2))
    assert one.findings == other.findings
    assert 3 <= one.rows < 20
    assert one.whole == 30
    low, high = one.as_dict()["findings"]["prompt_empty"]["interval"]
    assert low < 1 == pytest.approx(high)


def samples(names):
    return [(name.format(number), data(number)) for number in range(3) for name, data in names.items()]


MEMBERS = {
    "x2edit": {"{}.1.0.jpg": 0, "{}.2.jpg": 1, "{}.txt": 2},
    "shardedit": {"{}.input.jpg": 0, "{}.edited.jpg": 1, "{}.mask.png": 3, "{}.json": 4},
    "webdataset": {"{}.source.jpg": 0, "{}.target.jpg": 1, "{}.txt": 2},
}
CONTENT = [
    lambda number: row(number)["source_image"],
    lambda number: row(number)["edited_image"],
    lambda number: b"do it",
    lambda number: row(number)["mask_image"],
    lambda number: json.dumps({"instruction": "do it"}).encode(),
]


@pytest.mark.parametrize("layout", MEMBERS)
def test_tars_are_read_in_each_layout(tmp_path, audited, layout):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "00000.tar", "w") as tar:
        for number in range(3):
            for name, content in MEMBERS[layout].items():
                if number == 2 and name.endswith(("2.jpg", "edited.jpg", "target.jpg")):
                    continue
                data = CONTENT[content](number)
                member = tarfile.TarInfo(name.format(number))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    result = audited(tmp_path / "set")
    assert (result.layout, result.rows) == (layout, 3)
    assert found_in(result) == {"2": {"missing"}}


def test_a_table_that_names_files_is_held_against_those_in_its_tars(tmp_path, audited):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "part0.tar", "w") as tar:
        for number in range(3):
            for side, column in enumerate(("source_image", "edited_image")):
                data = row(number)[column]
                member = tarfile.TarInfo(f"pics/{number}_{side}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    paths = [[f"pics/{number}_{side}.jpg" for number in (0, 1, 7)] for side in (0, 1)]
    paths[0][1] = "old/1_0.jpg"
    table = {"input_images": [[path] for path in paths[0]], "output_images": [[path] for path in paths[1]]}
    pq.write_table(pa.table(table | {"prompt": ["a", "b", "c"]}), folder / "part0.parquet")
    result = audited(folder)
    assert (result.layout, result.rows) == ("imgedit", 3)
    found = found_in(result)
    assert found == {"00000001": {"path_differs"}, "00000002": {"missing"}, "": {"orphan"}}
    (orphans,) = [one.detail for one in result.findings if one.finding == "orphan"]
    assert "2 picture(s)" in orphans
    assert "pics/2_0.jpg" in orphans


def test_folders_of_instructpix2pix_are_read(tmp_path, audited):
    for number in range(2):
        folder = tmp_path / "set" / f"000000{number}"
        folder.mkdir(parents=True)
        (folder / "prompt.json").write_text(json.dumps({"edit": "do it", "input": "a", "output": "b"}))
        (folder / "77_0.jpg").write_bytes(row(number)["source_image"])
        if number == 0:
            (folder / "77_1.jpg").write_bytes(row(number)["edited_image"])
    assert found_in(audited(tmp_path / "set")) == {"0000001/77": {"missing"}}


def test_a_worse_result_of_a_preference_pair_is_looked_at_too(write_set, audited):
    rows = [
        {
            "source_image": row(number)["source_image"],
            "chosen_image": row(number)["edited_image"],
            "rejected_image": jpeg(np.roll(edited(number), number * 3, axis=0), 92),
            "prompt": "do it",
        }
        for number in range(2)
    ]
    found = found_in(audited(write_set(rows)))
    assert "misaligned" in found["00000001 (rejected)"]
    assert "misaligned" not in found.get("00000001", set())


def test_layouts_are_told_by_their_columns():
    for columns, name in (
        (["original_prompt", "original_image", "edit_prompt", "edited_prompt", "edited_image"], "ip2p_original"),
        (["input_image", "edit_prompt", "edited_image"], "instructpix2pix"),
        (["img_id", "turn_index", "source_img", "mask_img", "instruction", "target_img"], "magicbrush"),
        (["input", "input_image", "edit", "inverse_edit", "output", "output_image"], "hq_edit"),
    ):
        layout = layout_of_columns(columns)
        assert layout is not None
        assert layout.name == name
    assert layout_of_columns(["image", "text"]) is None
    assert layout_of_members(["jpg", "txt"]) is None
    assert split_of("data/validation-00000-of-00001.parquet") == "validation"
    assert split_of("data/latest.parquet") == ""


def test_what_cannot_be_audited_is_said_with_the_way_out(tmp_path, write_set, audited):
    with pytest.raises(SourceError, match="does not exist"):
        audited(tmp_path / "nowhere")
    folder = write_set([{"image": row(0)["source_image"], "text": "a"}])
    with pytest.raises(SourceError, match=r"no layout of edit pairs that is known.*--columns source="):
        audited(folder)
    with pytest.raises(SourceError, match="has no column or member picture"):
        audited(folder, layout=layout_of_options("source=picture,edited=image"))
    with pytest.raises(RecipeError) as problem:
        layout_of_options("source=a,edted=b")
    assert [path for path, _ in problem.value.problems] == ["edted", "edited"]


def test_columns_may_be_named(write_set, audited):
    rows = [
        {"before_image": one["source_image"], "after_image": one["edited_image"], "say": "x y"}
        for one in (row(0), row(1))
    ]
    layout = layout_of_options("source=before_image, edited=after_image, prompt=say")
    assert audited(write_set(rows), layout=layout).findings == ()


def test_the_command_ends_with_3_where_there_is_an_error(tmp_path, write_set):
    folder = write_set([row(0), row(1, edit_prompt="")])
    done = CliRunner().invoke(app, ["audit", str(folder), "--out", str(tmp_path / "out"), "--engine", "local"])
    assert done.exit_code == 3, done.output
    assert "prompt_empty" in done.output
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.slow
def test_on_ray_the_same_files_are_written(tmp_path, write_set, audited):
    folder = write_set([row(number, edit_prompt="" if number % 7 == 3 else "x") for number in range(140)])
    audited(folder)
    audited(folder, out=str(tmp_path / "on_ray"), engine="ray")
    for path in (tmp_path / "audit").iterdir():
        assert path.read_bytes() == (tmp_path / "on_ray" / path.name).read_bytes()
