"""The architecture as a test: imports point down, and each foreign library has its place."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"
# From the ground up. A module may import from its own layer and from those below it; the longest name decides.
LAYERS = [
    {"errors", "common", "compat"},
    {"diffusion"},
    {"rewards", "experts", "remote"},
    {"records", "samples", "directions", "interventions", "recordings", "placement", "subjects"},
    {"engine"},
    {"models"},
    {"inversion", "editing"},
    {"recipe", "settings"},
    {"reading", "gating", "seeds", "evaluation.metrics", "pairs.alignment", "pairs.affine"},
    {"writing"},
    {"best_of", "one_image", "answering"},
    {"flow"},
    {"evaluation"},
    {"looking.results", "looking.report"},  # a run ends with its report
    {"running"},
    {"studies"},
    {"looking"},
    {"evaluation.job", "evaluation.from_run", "pairs"},
    {"editor", "result"},
    {"cli_sae", "pairs_cli"},
    {"cli"},
    {"entry"},
]
FOREIGN = {
    "ray": {"running.on_ray"},
    "diffusers": {"models"},
    "transformers": {"models"},
    "fsspec": {"reading", "writing"},
    "typer": {"cli", "cli_sae", "pairs_cli", "looking.ending"},
    "httpx2": {"remote"},
    "scipy": {"evaluation"},
}
PLANTED = "from pipeline.cli import main\n"
LOWEST = [
    "common/showing.py",
    "engine/calls.py",
    "editing/base.py",
    "reading/storage.py",
    "writing/files.py",
    "flow.py",
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def imports(source: str) -> Iterator[str]:
    """Every module that is imported anywhere, in functions too; not what type checkers alone see."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                assert child.module is not None, "imports here are absolute"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole.removeprefix("pipeline.") in MODULES else child.module
            yield from walk(child)

    return walk(ast.parse(source))


def layer(name: str) -> int:
    for cut in range(name.count(".") + 1):
        prefix = name.rsplit(".", cut)[0]
        for at, names in enumerate(LAYERS):
            if prefix in names:
                return at
    raise AssertionError(f"{name} is in no layer: give it a folder that is in one, or a place in LAYERS")


def upward(name: str, source: str) -> list[str]:
    """What a module imports from layers above its own."""
    ours = [module.removeprefix("pipeline.") for module in imports(source) if module.startswith("pipeline.")]
    return [module for module in ours if layer(module) > layer(name)]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    assert not upward(name, MODULES[name].read_text())


@pytest.mark.parametrize("path", LOWEST)
@pytest.mark.parametrize("where", ["", "def late() -> None:\n    "])
def test_an_import_from_above_is_seen_in_every_layer(path: str, where: str) -> None:
    source = (PACKAGE / path).read_text()
    assert upward(name_of(PACKAGE / path), f"{source}\n{where}{PLANTED}") == ["cli"]


@pytest.mark.parametrize("library", FOREIGN)
def test_a_foreign_library_is_used_in_its_own_place_only(library: str) -> None:
    users = {
        name for name, path in MODULES.items() if library in {one.split(".")[0] for one in imports(path.read_text())}
    }
    assert {name for name in users if not any(f"{name}.".startswith(f"{own}.") for own in FOREIGN[library])} == set()
    assert users, f"nobody uses {library}: is it still a dependency?"


def test_diffusion_knows_torch_and_errors_alone() -> None:
    used = {module for name, path in MODULES.items() if layer(name) == 1 for module in imports(path.read_text())}
    ours = {module for module in used if module.startswith("pipeline.") and not module.startswith("pipeline.diffusion")}
    assert ours <= {"pipeline.errors"}
    foreign = {module.split(".")[0] for module in used} - {"pipeline"}
    assert foreign - set(sys.stdlib_module_names) <= {"torch", "jaxtyping", "typing_extensions"}
