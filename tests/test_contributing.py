"""CONTRIBUTING says which files a new editor, inversion or family is: is it so for those that there are, and enough?"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from demo_world.methods import AIMLESS
from jobs import methods_overview
from pipeline.editing import EDITORS
from pipeline.editing.base import EditingMethod
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion
from pipeline.models.families import FAMILIES
from pipeline.models.families.base import Family
from tests.facts import EditorFacts, InversionFacts

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KINDS: dict[str, dict[str, type[Any]]] = {
    "An editor": dict(EDITORS),
    "An inversion": dict(INVERSIONS),
    "A family": {family.name: type(family) for family in FAMILIES.values()},
}
BASES: dict[str, type[Any]] = {"An editor": EditingMethod, "An inversion": Inversion, "A family": Family}
PACKAGES = {
    "An editor": "pipeline.editing",
    "An inversion": "pipeline.inversion",
    "A family": "pipeline.models.families",
}
ENTRIES = [(kind, name) for kind, registry in KINDS.items() for name in registry]
every_kind = pytest.mark.parametrize("kind", KINDS)


def listed(kind: str) -> list[str]:
    """The patterns of a kind's list."""
    (items,) = re.findall(rf"{kind} is\s+these files:\n\n((?:- .*\n(?:  .*\n)*)+)", TEXT)
    return re.findall(r"^- `([^`]+)`", items, re.MULTILINE)


def made() -> set[str]:
    """What commands write."""
    (items,) = re.findall(r"Commands make the rest from these:\n\n((?:- .*\n)+)", TEXT)
    return set(re.findall(r"`((?:docs)/[^`]+)`", items))


def page_pattern(kind: str) -> str:
    (pattern,) = (pattern for pattern in listed(kind) if pattern.startswith("docs/"))
    return pattern


@every_kind
def test_a_list_has_at_most_four_files(kind: str) -> None:
    assert 1 <= len(listed(kind)) <= 4
    assert {pattern.split("/")[0] for pattern in listed(kind)} == {"pipeline", "tests", "docs"}


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[name for _, name in ENTRIES])
def test_what_is_registered_has_all_files_of_its_list_and_each_names_it(kind: str, name: str) -> None:
    for pattern in listed(kind):
        file = ROOT / pattern.replace("NAME", name)
        assert file.is_file(), f"{name} lacks {file.relative_to(ROOT)}, which CONTRIBUTING lists"
        assert re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")), f"{file} does not name {name}"
    assert f"{PACKAGES[kind]}.{name}" == KINDS[kind][name].__module__


@every_kind
def test_what_is_in_a_package_and_can_be_used_is_registered(kind: str) -> None:
    """A module that defines no method or family of its own is shared by those that do."""
    found = set()
    for module in pkgutil.iter_modules(importlib.import_module(PACKAGES[kind]).__path__, f"{PACKAGES[kind]}."):
        members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        own = [one for _, one in members if one.__module__ == module.name and issubclass(one, BASES[kind])]
        found |= {one for one in own if not inspect.isabstract(one)}
    assert found == set(KINDS[kind].values())


def test_a_page_belongs_to_what_is_registered_or_is_made() -> None:
    for folder, kinds in {"methods": ("An editor", "An inversion"), "families": ("A family",)}.items():
        names = {name for kind in kinds for name in KINDS[kind]}
        pages = {page_pattern(kind).replace("NAME", name) for kind in kinds for name in KINDS[kind]}
        there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs" / folder).iterdir()}
        assert there - made() == pages
        assert len(names) == sum(len(KINDS[kind]) for kind in kinds), "two of one name would share a page"


@pytest.mark.parametrize(("kind", "facts"), [("An editor", EditorFacts), ("An inversion", InversionFacts)])
def test_a_test_module_that_says_facts_is_that_of_a_method(kind: str, facts: type[Any]) -> None:
    folder = ROOT / "tests" / PACKAGES[kind].rpartition(".")[2]
    saying = {path.stem for path in folder.glob("test_*.py") if f"FACTS = {facts.__name__}(" in path.read_text()}
    assert saying == {f"test_{name}" for name in KINDS[kind]}


def test_what_commands_make_is_there_for_every_editor_too() -> None:
    for pattern in made():
        for name in EDITORS:
            assert (ROOT / pattern.replace("NAME", name)).is_file()


def test_the_overview_of_methods_is_that_of_the_code_and_the_pages() -> None:
    text = (ROOT / methods_overview.PAGE).read_text(encoding="utf-8")
    assert methods_overview.page(text, ROOT / methods_overview.FOLDER) == text, "run make recipe-reference"


def test_an_overview_without_marks_or_a_page_without_its_line_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        methods_overview.page("# Methods\n")
    for name in (*INVERSIONS, *EDITORS):
        (tmp_path / f"{name}.md").write_text(f"# `{name}`\n\nNo table.\n")
    with pytest.raises(ValueError, match=r"ddim\.md has no table with the head '\| records \|"):
        methods_overview.page(f"{methods_overview.BEGIN}\n{methods_overview.END}\n", tmp_path)


@cache
def with_toys() -> Any:
    """What the package makes of two methods that were added to the registries alone; see tests/toys.py."""
    done = subprocess.run([sys.executable, "-m", "tests.toys"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_new_methods_are_paired_by_what_they_need_with_the_others_and_each_other() -> None:
    toys = {tuple(pair) for pair in with_toys()["pairs"] if {"toy_editor", "toy_inversion"} & set(pair)}
    of_the_editor = {(name, "toy_editor") for name in ("ddim", "ddpm", "noise", "toy_inversion")}
    fitting = {name for name, one in EDITORS.items() if one.fits(INVERSIONS["noise"])}
    as_noise = {("toy_inversion", name) for name in fitting - AIMLESS}
    assert toys == of_the_editor | as_noise


def test_new_methods_are_printed_described_and_planned() -> None:
    found = with_toys()
    assert re.search(r"toy_editor +│ spring: 0\.5 +│ goes with ddim, ddpm,", found["methods"])
    assert re.search(r"toy_inversion +│ num_steps: 4 +│ replays none", found["methods"])
    assert "### editing: toy_editor" in found["reference"]
    assert "| `spring` | number | `0.5` | How far it jumps. |" in found["reference"]
    assert "ToyEditor" in found["schema"]
    assert found["planned"] == 3
