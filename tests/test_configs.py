"""Every recipe in configs/ parses, opens with what it makes and how to run it, and names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.recipe import Recipe, load_recipe
from pipeline.running.demo import demo_recipe

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "evaluate")  # see test_evaluate.py
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@every_config
def test_a_config_is_a_possible_recipe(config):
    recipe = load_recipe(config)
    assert recipe.all_methods


@every_config
def test_an_editor_that_knows_the_schema_accepts_a_config(config):
    data, schema = yaml.safe_load(config.read_text(encoding="utf-8")), Recipe.model_json_schema()
    jsonschema.validate(data, schema)
    for section in data.keys() & schema["properties"].keys():
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | {section: "misplaced"}, schema)


@every_config
def test_a_config_opens_with_what_it_makes_and_the_command(config):
    head = re.match(r"(#.*\n)+", config.read_text(encoding="utf-8"))
    assert head is not None
    assert len(head[0].splitlines()) >= 3
    assert f"shardedit edit configs/{config.relative_to(FOLDER)}" in head[0]


@every_config
def test_a_config_lists_its_sections_in_the_order_of_the_flow(config):
    order = ["source", "edits", "model", "inversion", "editing", "methods", "sink", "run"]
    sections = list(yaml.safe_load(config.read_text(encoding="utf-8")))
    assert sections == [name for name in order if name in sections]


def test_the_demonstration_runs_the_demo_config():
    assert load_recipe(FOLDER / "demo.yaml") == demo_recipe(Path("demo-output"))
