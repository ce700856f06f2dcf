"""Instructions from templates: what they say, that a row's is its own and stays, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import recipe_from
from pipeline.records import EditRequest, Gated
from pipeline.settings.instructions import TEMPLATES, InstructionsConfig
from pipeline.writing.instructions import drawn_instruction, instruction_of
from pipeline.writing.rows import encode_outcome, schema_of
from tests.runs import recipe_data
from tests.writing.making import MODEL, make_edited, make_sample

HAT_OFF = {"prompt": "a red hat", "direction": "remove"}
CONFIG = InstructionsConfig(
    templates={"add": ("put on {what}",), "remove": ("take off {what}", "lose {what}")},
    synonyms={"hat": ("cap", "bonnet")},
)


def drawn(request: dict[str, Any], seeds: int = 60) -> set[str]:
    return {drawn_instruction(EditRequest.model_validate(request), CONFIG, seed).text for seed in range(seeds)}


def test_every_sentence_and_every_word_has_its_turn() -> None:
    verbs, words = ("take off", "lose"), ("hat", "cap", "bonnet")
    assert drawn({"concepts": [HAT_OFF]}) == {f"{verb} a red {word}" for verb in verbs for word in words}


def test_several_concepts_are_joined_and_one_of_scale_zero_is_left_out() -> None:
    concepts = [{"prompt": "glasses"}, HAT_OFF, {"prompt": "a beard", "guidance_scale": 0}]
    assert all(text.startswith("put on glasses and ") for text in drawn({"concepts": concepts}))


def test_prompts_fill_the_sentences_of_a_change() -> None:
    found = drawn({"source_prompt": "a cat", "target_prompt": "a dog"})
    assert found == {one.format(before='"a cat"', after='"a dog"') for one in TEMPLATES["change"]}


@pytest.mark.parametrize(
    ("request_", "source"),
    [
        ({"instruction": "Hats off!", "concepts": [HAT_OFF]}, "given"),
        ({"direction": {}, "concepts": [HAT_OFF]}, "words"),
        ({"target_prompt": "a dog"}, "words"),
    ],
)
def test_what_is_given_stays_and_what_no_template_is_for_has_plain_words(request_: dict[str, Any], source: str) -> None:
    request = EditRequest.model_validate(request_)
    assert drawn_instruction(request, CONFIG, 0) == (instruction_of(request), source, "")
    assert instruction_of(request)


def test_a_rows_instruction_depends_on_image_and_edit_and_says_where_it_comes_from(tmp_path: Path) -> None:
    data = recipe_data(tmp_path, tmp_path / "out") | {"instructions": CONFIG.model_dump(mode="json")}
    recipe = recipe_from(data)
    request = EditRequest.model_validate({"concepts": [HAT_OFF]})
    made = [
        encode_outcome(make_edited(at, edit, request=request, gated=Gated(figures={}, reasons=())), recipe, MODEL, 8)
        for at in (0, 0, 1, 2, 3)
        for edit in ("a", "b")
    ]
    texts = [row["instruction"] for row in made if isinstance(row, dict)]
    assert texts[:2] == texts[2:4]
    assert len(set(texts)) > 2
    assert {(row["instruction_source"], row["instruction_revision"]) for row in made if isinstance(row, dict)} == {
        ("templates", CONFIG.revision)
    }
    assert {"instruction_source", "instruction_revision"} <= set(schema_of(recipe).names)
    assert make_sample(0).id != make_sample(1).id


def test_other_sentences_are_another_revision() -> None:
    other = CONFIG.model_copy(update={"synonyms": {"hat": ("cap",)}})
    assert InstructionsConfig().revision != CONFIG.revision != other.revision


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"templates": {"add": ["put on a thing"]}}, "'put on a thing' must have {what}, once"),
        ({"templates": {"change": ["{before} and {before}"]}}, "must have {before} and {after}, once"),
        ({"templates": {"remove": ["take {what} {0}"]}}, "nothing else in braces"),
        ({"templates": {"remove": ["take {what"]}}, "must have {what}"),
        ({"templates": {"add": []}}, "add has no sentence"),
        ({"synonyms": {"red hat": ["cap"]}}, "'red hat' must be one word"),
    ],
)
def test_sentences_that_cannot_be_filled_are_refused(section: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_from(recipe_data(tmp_path, tmp_path / "out") | {"instructions": section})
    assert said in str(refused.value)
