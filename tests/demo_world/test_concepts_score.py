"""The study of concepts on drawn faces: what is asked, and how results are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from demo_world.concepts_reach import Kind, judged, other_value, variants_of
from demo_world.concepts_scenes import described
from demo_world.concepts_score import KINDS, main
from demo_world.oracle import VALUES, read
from pipeline.interventions import Intervention
from pipeline.models.demo.world import Scene, draw

SCENE = Scene(face_color="green", background="navy", sunglasses=True, hat="red", mouth="frown")


def test_a_prompt_says_all_that_a_scene_shows_but_what_is_left_to_the_model() -> None:
    whole = "a round green face with a frown and sunglasses and a red hat on a navy background"
    assert described(SCENE) == whole
    assert described(SCENE, "background") == whole.replace(" on a navy background", "")
    assert described(SCENE, "face_color") == whole.replace("green ", "")
    assert described(SCENE, "mouth") == whole.replace("a frown and ", "")


def test_a_result_is_done_where_the_wanted_value_is_read_and_every_other_attribute_is_compared() -> None:
    was = read(draw(SCENE))
    done, hatless = draw(replace(SCENE, background="mint")), draw(replace(SCENE, background="mint", hat=None))
    scenes = {0: (was, "mint", done), 1: (was, "mint", hatless), 2: (was, "gray", done), 3: (was, "mint", None)}
    found = judged("background", scenes)
    assert found.success == 0.5
    assert found.failed == 1
    assert found.collateral == {name: 1 / 3 if name == "hat" else 0.0 for name in VALUES if name != "background"}
    assert found.worst == 1 / 3


def test_wanted_values_are_others_in_turn() -> None:
    wanted = [other_value("background", "navy", number) for number in range(4)]
    assert sorted(wanted) == sorted(set(VALUES["background"]) - {"navy"})
    assert other_value("sunglasses", False, 3) is True


def test_every_way_to_write_a_kind_is_an_intervention() -> None:
    kind = Kind(attribute="background", window="middle", strength=2.0)
    found = variants_of(kind, ("mid_block.attentions.0",), (0.5,))
    assert list(found) == [
        *(f"window-{name}" for name in ("early", "middle", "late", "first", "all")),
        "block-mid_block_attentions_0",
        "strength-x0_5",
    ]
    made = {name: Intervention(**one.intervention("navy", "mint"), **more) for name, (one, more) in found.items()}
    assert made["window-early"].window == (0.0, 0.3)
    assert made["strength-x0_5"].strength == 1.0
    assert made["block-mid_block_attentions_0"].blocks == ("mid_block.attentions.0",)
    for one in made.values():
        assert (one.add, one.remove, one.region) == (("background: mint",), ("background: navy",), "predicted")
    forms = variants_of(replace(kind, form="template"), (), (0.5,))
    assert {name: one.form for name, (one, _) in forms.items()} == dict.fromkeys(forms, "template") | {
        "form-direction": "direction"
    }
    placed = Intervention(**KINDS[-1].intervention(False, True))
    assert (placed.add, placed.remove) == (("sunglasses",), ())
    assert placed.region is not None


@pytest.mark.slow
def test_the_chain_runs_from_collecting_to_figures(tmp_path: Path) -> None:
    main(scenes=24, labelled=12, fresh=6, edited=2, vectors=4_096, features=64, seed=50, out=tmp_path)
    figures = json.loads((tmp_path / "concepts.json").read_text())
    shares = ["style_success", "style_collateral", "object_placed", "layout_iou_first", "layout_iou_constant"]
    assert all(0 <= figures[name] <= 1 for name in [*shares, "layout_iou_last"])
    assert 0 <= figures["features_found"] <= figures["tags"] <= 20
    assert (tmp_path / "concepts.png").read_bytes().startswith(b"\x89PNG")
