"""The recipe refuses what cannot work: every problem at once, with the key's path and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion import INVERSIONS
from pipeline.recipe import Recipe, load_recipe, parse_edits, recipe_from

SMALLEST = {"source": {"shards": "in/*.tar"}, "sink": {"folder": "out"}}
SUNGLASSES = {"concepts": [{"prompt": "sunglasses"}]}


def problems_of(data: object) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        recipe_from(data, "configs/cats.yaml")
    assert str(caught.value).startswith(f"configs/cats.yaml has {len(caught.value.problems)} problem(s):")
    return dict(caught.value.problems)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cats.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "edits": SUNGLASSES}), encoding="utf-8")
    return path


def test_two_lines_are_a_recipe():
    recipe = recipe_from(SMALLEST)
    assert list(recipe.all_methods) == ["ledits_pp"]
    assert recipe.source.shards == ("in/*.tar",)


def test_all_problems_are_reported_at_once_with_their_paths():
    found = problems_of(
        {
            "source": {"shards": "in/*.tar", "formt": "parquet"},
            "edits": {"glasses": {"concepts": [{"prompt": "sunglasses", "treshold": 0.9}, {"prompt": "  "}]}},
            "inversion": {"method": "ddpm", "num_steps": 0},
            "run": {"call_size": 0},
        }
    )
    assert set(found) == {
        "source.formt",
        "edits.glasses.concepts.0.treshold",
        "edits.glasses.concepts.1.prompt",
        "inversion.num_steps",
        "run.call_size",
        "sink",
    }
    assert found["source.formt"] == "unknown key. Did you mean 'format'?"
    assert found["inversion.num_steps"] == "should be a whole number from 1 to 999, is 0"


def test_an_unknown_method_names_the_known_ones():
    found = problems_of({**SMALLEST, "inversion": {"method": "ddimm"}, "editing": {"method": "ledits"}})
    assert found["inversion"] == f"method is 'ddimm', known are: {', '.join(INVERSIONS)}. Did you mean 'ddim'?"
    assert "ledits_pp" in found["editing"]


def test_a_section_without_a_method_names_the_known_ones():
    assert "ddpm" in problems_of({**SMALLEST, "inversion": {"num_steps": 4}})["inversion"]


def test_a_pair_that_does_not_fit_names_the_inversions_that_would():
    found = problems_of({**SMALLEST, "inversion": {"method": "ddim"}})
    assert "'ledits_pp' cannot work with inversion.method 'ddim'" in found["editing"]
    assert "It works with: ddpm;" in found["editing"]
    assert "that inversion with: cfg" in found["editing"]


def test_named_methods_are_checked_one_by_one():
    found = problems_of(
        {
            **SMALLEST,
            "edits": {"target_prompt": "a cat"},
            "methods": {
                "good": {"inversion": {"method": "ddim"}, "editing": {"method": "cfg"}},
                "bad": {"inversion": {"method": "noise"}, "editing": {"method": "ledits_pp"}},
            },
        }
    )
    assert set(found) == {"methods.bad.editing", "edits"}
    assert "(method 'bad')" in found["edits"]


def test_methods_and_a_single_pair_exclude_each_other():
    found = problems_of({**SMALLEST, "methods": {"one": {}}, "editing": {"method": "ledits_pp"}})
    assert "Remove one or the other" in found["recipe"]


@pytest.mark.parametrize("prompt", ["", "   ", None])
def test_an_empty_prompt_is_refused(prompt):
    found = problems_of({**SMALLEST, "edits": {"concepts": [{"prompt": prompt}]}})
    assert list(found) == ["edits.concepts.0.prompt"]


def test_an_unknown_word_is_no_error():
    recipe = recipe_from({**SMALLEST, "edits": {"concepts": [{"prompt": "a flurbelwock"}]}})
    assert recipe.edits["edit"].concepts[0].prompt == "a flurbelwock"


def test_a_concept_that_never_acts_is_refused():
    steps = {"method": "ddpm", "num_steps": 10}
    late = {**SMALLEST, "inversion": steps, "edits": {"concepts": [{"prompt": "a hat", "warmup_steps": 10}]}}
    assert "Lower warmup_steps" in problems_of(late)["edits"]
    closed = {"concepts": [{"prompt": "a hat", "warmup_steps": 5, "cooldown_steps": 5}]}
    assert "would never act" in problems_of({**SMALLEST, "edits": closed})["edits.concepts.0"]


PROMPTS = {"source_prompt": "a cat", "target_prompt": "a dog"}


@pytest.mark.parametrize(
    ("sections", "at", "reason"),
    [
        ({"inversion": {"method": "ddpm", "skip": float("inf")}}, "inversion.skip", "finite"),
        ({"inversion": {"method": "ddpm", "num_steps": 600, "skip": 0.7}}, "inversion", "possible are 999"),
        ({"inversion": {"method": "ddpm", "num_steps": 600, "skip_steps": 400}}, "inversion", "possible are 999"),
        ({"editing": {"method": "cfg", "start_step": 30}, "edits": PROMPTS}, "editing", "leaves none of the 30 steps"),
        ({"editing": {"method": "masactrl", "start_step": 30}, "edits": PROMPTS}, "editing", "leaves none of the 30"),
        (
            {"editing": {"method": "prompt_to_prompt", "self_replace_steps": [0.6, 0.2]}, "edits": PROMPTS},
            "editing",
            "before it begins",
        ),
        (
            {
                "inversion": {"method": "ddpm", "num_steps": 30, "skip_steps": 30},
                "editing": {"method": "prompt_to_prompt", "cross_replace_steps": [0.8, 1.0]},
                "edits": PROMPTS,
            },
            "editing",
            "only 30 of the schedule's 60 steps are walked",
        ),
        (
            {
                "inversion": {"method": "ddpm", "num_steps": 30, "skip_steps": 30},
                "editing": {"method": "prompt_to_prompt", "start_blend": 0.5},
                "edits": {**PROMPTS, "blend_words": {"source": ["cat"]}},
            },
            "edits",
            "Lower editing.start_blend",
        ),
        (
            {
                "inversion": {"method": "negative_prompt"},
                "editing": {"method": "masactrl"},
                "edits": {**PROMPTS, "negative_prompt": "snow"},
            },
            "edits",
            "Leave negative_prompt out",
        ),
        (
            {"editing": {"method": "prompt_to_prompt"}, "edits": {**PROMPTS, "equalizer": {"dog": float("nan")}}},
            "edits.equalizer.dog",
            "finite",
        ),
    ],
)
def test_settings_without_effect_or_sense_are_refused(sections, at, reason):
    found = problems_of({**SMALLEST, **sections})
    assert list(found) == [at]
    assert reason in found[at]


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", "-x"])
def test_the_name_of_an_edit_is_safe_as_a_file_name(name):
    assert next(iter(problems_of({**SMALLEST, "edits": {name: SUNGLASSES}}))).startswith("edits.")


def test_a_file_that_is_no_recipe_says_so(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    for text, reason in {"a: [": "is not YAML", "- 1": "should be a mapping", "": "source"}.items():
        path = tmp_path / "broken.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=reason):
            load_recipe(path)


def test_overrides_reach_sections_lists_and_new_keys(config):
    recipe = load_recipe(
        config,
        [
            "inversion.method=ddpm",
            "inversion.num_steps=12",
            "edits.concepts.0.guidance_scale=-7.5",
            "run.engine=local",
            "source.shards=[a.tar, b.tar]",
        ],
    )
    assert recipe.inversion.num_steps == 12
    assert recipe.edits["edit"].concepts[0].guidance_scale == -7.5
    assert recipe.run.engine == "local"
    assert recipe.source.shards == ("a.tar", "b.tar")


@pytest.mark.parametrize(
    "override", ["run.seed", "=3", "source.shards.deep=3", "edits.concepts.7.prompt=hat", "edits.concepts.x=1", "a=[b"]
)
def test_an_override_that_leads_nowhere_is_refused(config, override):
    with pytest.raises(RecipeError, match="override"):
        load_recipe(config, [override])


def test_an_override_is_checked_like_the_file(config):
    with pytest.raises(RecipeError, match=r"run\.sed: unknown key"):
        load_recipe(config, ["run.sed=3"])


def test_the_hash_follows_what_decides_results_and_nothing_else(config):
    recipe = load_recipe(config)
    same = load_recipe(
        config, ["sink.folder=elsewhere", "run.engine=local", "run.workers=3", "run.max_failed_fraction=0.1"]
    )
    assert same.hash == recipe.hash
    assert load_recipe(config, ["run.workers={min: 1, max: 8}"]).hash == recipe.hash
    assert len(recipe.hash) == 16
    for override in (
        "run.seed=1",
        "run.call_size=8",
        "edits.concepts.0.threshold=0.5",
        "model.size=64",
        "sink.quality=9",
    ):
        assert load_recipe(config, [override]).hash != recipe.hash, override


def test_the_hash_is_that_of_earlier_versions_so_that_their_runs_go_on():
    """Who changes it on purpose says so in the changelog: a run that was begun before is refused from then on."""
    recipe = recipe_from(
        {
            "source": {"shards": "in"},
            "edits": {"concepts": [{"prompt": "a hat"}]},
            "model": {"name": "demo"},
            "inversion": {"method": "ddpm", "num_steps": 20},
            "editing": {"method": "ledits_pp"},
            "sink": {"folder": "out"},
        }
    )
    assert recipe.hash == "66afe32254450406"
    sets = {
        "source": {"shards": "in", "format": "sets"},
        "model": {"name": "demo"},
        "inversion": {"method": "noise", "num_steps": 20},
        "sink": {"folder": "out"},
    }
    assert recipe_from(sets | {"editing": {"method": "consistory"}}).hash == "8f1b85b684a6319d"
    by_h_edit = sets | {"source": {"shards": "in"}, "edits": {"target_prompt": "a hat"}}
    by_h_edit["inversion"] = {"method": "ddpm", "num_steps": 20, "skip_steps": 0}
    assert recipe_from(by_h_edit | {"editing": {"method": "h_edit"}}).hash == "90c4f580b57cdf0a"
    for other in ({"anchor_weight": 2}, {"outline_factor": 4}):
        assert recipe_from(sets | {"editing": {"method": "consistory", **other}}).hash != "8f1b85b684a6319d"
    on_input = by_h_edit | {"editing": {"method": "h_edit"}, "sink": {"folder": "out", "background": "input"}}
    assert recipe_from(on_input).hash != "90c4f580b57cdf0a"


def test_the_hash_does_not_depend_on_spelling_or_order():
    one = recipe_from({**SMALLEST, "edits": SUNGLASSES, "run": {"seed": 0}})
    other = recipe_from(
        {
            "edits": {"edit": {"concepts": [{"guidance_scale": 5, "prompt": " sunglasses "}]}},
            "sink": {"folder": "out"},
            "source": {"shards": ["in/*.tar"]},
        }
    )
    assert one.hash == other.hash
    assert one.canonical_json() == other.canonical_json()


def test_storage_options_are_never_written_down():
    recipe = recipe_from(
        {
            "source": {"shards": "s3://a/b.tar", "storage_options": {"secret": "hunter2"}},
            "sink": {"folder": "s3://a/out", "storage_options": {"key": "hunter3"}},
        }
    )
    assert "hunter" not in recipe.canonical_json()
    assert "hunter" not in repr(recipe)
    assert recipe.source.storage_options == {"secret": "hunter2"}


def test_the_canonical_json_is_a_recipe_again():
    recipe = recipe_from({**SMALLEST, "edits": SUNGLASSES})
    assert recipe_from(json.loads(recipe.canonical_json())) == recipe


def test_every_key_of_the_recipe_has_a_description():
    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    keys = [(section, key, value) for section in sections for key, value in sections[section]["properties"].items()]
    assert len(keys) > 100
    assert [f"{section}.{key}" for section, key, value in keys if not value.get("description", "").endswith(".")] == []


def test_the_schema_accepts_what_the_recipe_accepts_and_knows_every_method():
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(recipe_from({**SMALLEST, "edits": SUNGLASSES}).canonical_json()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**SMALLEST, "sorce": {}}, schema)
    assert {"DDIMInversion", "DDPMInversion", "LEditsPP"} <= set(schema["$defs"])


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (SUNGLASSES, ["edit"]),
        (json.dumps(SUNGLASSES), ["edit"]),
        (json.dumps(SUNGLASSES).encode(), ["edit"]),
        ({"one": SUNGLASSES, "two": {"target_prompt": "a cat"}}, ["one", "two"]),
        ({"concepts": [{"prompt": "hat", "cooldown_steps": None}], "target_prompt": None}, ["edit"]),
    ],
)
def test_a_row_brings_one_edit_or_several_named_ones(value, names):
    assert list(parse_edits(value, "row")) == names


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "holds no edit request but list"),
        ({}, "holds no edit request"),
        (7, "holds no edit request but int"),
        ({"concepts": [{"prompt": ""}]}, "concepts.0.prompt"),
        ({"conzepts": []}, "conzepts"),
        ({"a b": SUNGLASSES}, "'a b'"),
    ],
)
def test_a_row_whose_edit_is_none_is_told_what_is_wrong(value, reason):
    with pytest.raises(PrepareError, match=reason):
        parse_edits(value, "row")


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ({"concepts": [{"prompt": "hat"}] * 5}, 5),
        ({f"edit{n}": {"concepts": [{"prompt": "hat"}] * 2} for n in range(3)}, 6),
        ({f"edit{n}": {"target_prompt": "a hat"} for n in range(7)}, 7),
    ],
)
def test_a_row_may_not_ask_for_endless_work(value, count):
    assert parse_edits(value, "row", most=count)
    with pytest.raises(
        PrepareError, match=rf"asks for {count} concepts, more than source.max_row_concepts \({count - 1}\)"
    ):
        parse_edits(value, "row", most=count - 1)


@pytest.mark.parametrize(("size", "read"), [("500MB", 5 * 10**8), ("1.5 GB", 1.5 * 10**9), ("20kB", 20_000), (0, 0)])
def test_the_size_of_output_files_is_bytes_or_a_text_with_a_unit(size, read):
    assert (
        recipe_from({"source": {"shards": "in"}, "sink": {"folder": "out", "shard_size": size}}).sink.shard_size == read
    )


@pytest.mark.parametrize("size", ["500", "MB", "1TB", -1])
def test_another_size_of_output_files_is_refused_in_words(size):
    with pytest.raises(RecipeError, match=r"sink\.shard_size: should be .*whole number"):
        recipe_from({"source": {"shards": "in"}, "sink": {"folder": "out", "shard_size": size}})
