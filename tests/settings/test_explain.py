"""What is wrong with a recipe, in words: what is allowed, what was found, where a lost key belongs; and no secret."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.editing import EDITORS
from pipeline.errors import RecipeError
from pipeline.inversion import INVERSIONS
from pipeline.recipe import recipe_from

PYDANTICS_OWN = (
    "Input should",
    "valid dictionary",
    "unable to parse",
    "Extra inputs",
    "Tuple",
    "String should",
    "expected tag",
)


def problems_of(**sections: Any) -> dict[str, str]:
    data: dict[str, Any] = {"source": {"shards": "in/*.tar"}, "sink": {"folder": "out"}}
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(data.get(name), dict)
        data[name] = {**data[name], **section} if both else section
    with pytest.raises(RecipeError) as caught:
        recipe_from(data)
    for word in PYDANTICS_OWN:
        assert word not in str(caught.value)
    return dict(caught.value.problems)


@pytest.mark.parametrize(
    ("sections", "path", "text"),
    [
        ({"run": {"seed": "abc"}}, "run.seed", "should be a whole number of at least 0, is the text 'abc'"),
        ({"run": {"seed": 1.5}}, "run.seed", "should be a whole number of at least 0, is 1.5"),
        ({"run": {"unit_size": None}}, "run.unit_size", "should be a whole number from 1 to 4096, is empty"),
        (
            {"run": {"call_size": "x"}},
            "run.call_size",
            "should be a whole number of at least 1 or 'auto', is the text 'x'",
        ),
        (
            {"run": {"workers": "atuo"}},
            "run.workers",
            "should be a whole number of at least 1, 'auto' or a mapping with the keys min, max, is the text 'atuo'. "
            "Did you mean 'auto'?",
        ),
        ({"run": {"workers": {"min": 2, "max": 1}}}, "run.workers", "min 2 is above max 1"),
        ({"run": {"workers": {"min": 3}}}, "run.workers.max", "is required"),
        ({"run": {"workers": {"min": 0, "max": 1}}}, "run.workers.min", "should be a whole number of at least 1, is 0"),
        (
            {"run": {"workers": {"min": 1, "max": 2, "mx": 2}}},
            "run.workers.mx",
            "unknown key. Did you mean 'max'?",
        ),
        ({"run": {"engine": "spark"}}, "run.engine", "should be 'ray' or 'local', is the text 'spark'"),
        ({"run": {"max_failed_fraction": 2}}, "run.max_failed_fraction", "should be a number from 0 to 1, is 2"),
        ({"source": {"shards": 3}}, "source.shards", "should be text or a list of texts, is 3"),
        ({"source": {"shards": []}}, "source.shards", "is empty. Give at least one"),
        ({"sink": {"include_input": "maybe"}}, "sink.include_input", "should be true or false, is the text 'maybe'"),
        (
            {"edits": {"a": {"concepts": "hat"}}},
            "edits.a.concepts",
            "should be a list, is the text 'hat'",
        ),
        (
            {"edits": {"a": {"concepts": [{"prompt": "hat", "threshold": 1}]}}},
            "edits.a.concepts.0.threshold",
            "should be a number of at least 0 and below 1, is 1",
        ),
        (
            {"edits": {"a": {"concepts": [{"prompt": "hat", "weight": float("inf")}]}}},
            "edits.a.concepts.0.weight",
            "should be a finite number, is inf",
        ),
        (
            {"edits": {"a": {"cross_replace_steps": {"hat": [0, 2]}}}},
            "edits.a.cross_replace_steps.hat.1",
            "should be a number from 0 to 1, is 2",
        ),
        ({"edits": {7: {}}}, "edits.7", "is 7 and should be a name: put it in quotes"),
        ({"inversion": "ddpm"}, "inversion", "should be a mapping with the key method and that method's own"),
        ({"inversion": {"method": "ddpm", "num_steps": [1]}}, "inversion.num_steps", "whole number from 1 to 999"),
    ],
)
def test_a_value_is_told_what_is_allowed_and_what_was_found(sections: Any, path: str, text: str) -> None:
    found = problems_of(**sections)
    assert list(found) == [path]
    assert text in found[path]


@pytest.mark.parametrize(
    ("registry", "section"), [(INVERSIONS, "inversion"), (EDITORS, "editing")], ids=["inversion", "editing"]
)
def test_every_key_of_another_method_names_a_method_that_has_it(registry: Any, section: str) -> None:
    told = 0
    for name, method in registry.items():
        for other_name, other in registry.items():
            for key in set(other.model_fields) - set(method.model_fields):
                text = problems_of(**{section: {"method": name, key: 1}})[f"{section}.{key}"]
                having = [f"'{one}'" for one, cls in registry.items() if key in cls.model_fields]
                assert f"unknown key of {section}.method '{name}': it is a key of " in text
                assert any(one in text for one in having), (other_name, text)
                told += 1
    assert told > 10


@pytest.mark.parametrize(
    ("sections", "path", "text"),
    [
        ({"seed": 3}, "seed", "is a key of run. Move it there, or remove it"),
        ({"num_steps": 3}, "num_steps", "is a key of inversion. Move it there"),
        ({"run": {"folder": "x"}}, "run.folder", "unknown key of run: it is a key of sink."),
        (
            {"editing": {"method": "ledits_pp", "direction": "add"}},
            "editing.direction",
            "edits.NAME.concepts. Move",
        ),
        ({"sorce": {}}, "sorce", "Did you mean 'source'?"),
        ({"run": {"sed": 3}}, "run.sed", "Did you mean 'seed'?"),
        ({"sink": {"num_step": 3}}, "sink.num_step", "Did you mean 'num_steps', a key of inversion?"),
        ({"model": {"zzz": 3}}, "model.zzz", "known are: name, revision"),
        ({"edits": {"concepts": [{"prompt": "hat"}], "taget_prompt": "x"}}, "edits.taget_prompt", "'target_prompt'?"),
        ({"edits": {"conzepts": [{"prompt": "hat"}]}}, "edits.conzepts", "Did you mean 'concepts'?"),
    ],
)
def test_a_lost_key_is_told_where_it_belongs_or_how_it_is_spelt(sections: Any, path: str, text: str) -> None:
    found = problems_of(**sections)
    assert list(found) == [path]
    assert text in found[path]


def test_what_may_be_a_secret_is_not_repeated() -> None:
    found = problems_of(
        source={"storage_options": "hunter2", "key": "hunter2"},
        sink={"quality": "s3://me:hunter2@host", "storage_options": ["hunter2"]},
    )
    assert len(found) == 4
    assert "hunter2" not in str(found)
