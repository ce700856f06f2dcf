"""The architecture as a test: imports point down, and each foreign library has its place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"
# From the ground up. A module may import from its own layer and from those below it.
LAYERS = [
    {"errors", "showing", "partition", "stopping"},
    {"diffusion"},
    {"records"},
    {"engine"},
    {"models"},
    {"inversion", "editing"},
    {"recipe", "sections", "explain", "yaml_file"},
    {"reading", "evaluation.metrics"},
    {"flow"},
    {"counting"},
    {"writing"},
    {"evaluation"},
    {"result"},
    {"editor"},
    {"models.demo.score", "models.demo.methods_table"},  # play with everything; nothing of the product imports them
]
# The engine runs on a backbone, whose interface speaks the engine's words.
ALLOWED_UP = {("engine", "engine.backbone"), ("models", "engine.calls")}
FOREIGN = {
    "ray": {"on_ray", "metering", "ray_settings"},
    "diffusers": {"models"},
    "transformers": {"models"},
    "typer": {"cli"},
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def imports(path: Path) -> list[str]:
    """Modules imported when the file is imported; imports inside `if TYPE_CHECKING` or functions do not count."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def all_imports(path: Path) -> set[str]:
    """Every top-level package that the file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def part(path: Path) -> str:
    return name_of(path).split(".")[0]


def level(name: str) -> int:
    """Place of a module among the layers; of layers that name a part of it, the longest name decides."""
    prefixes = [name.rsplit(".", cut)[0] if cut else name for cut in range(name.count(".") + 1)]
    for prefix in prefixes:
        for at, layer in enumerate(LAYERS):
            if prefix in layer:
                return at
    return len(LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    ours = name_of(path)
    wrong = []
    for module in imports(path):
        if not module.startswith("pipeline."):
            continue
        theirs = module.removeprefix("pipeline.")
        if level(theirs) > level(ours) and (ours.split(".")[0], theirs) not in ALLOWED_UP:
            wrong.append(module)
    assert not wrong


@pytest.mark.parametrize("library", FOREIGN)
def test_a_foreign_library_is_used_in_its_own_place_only(library: str) -> None:
    users = {part(path) for path in modules() if library in all_imports(path)}
    assert users <= FOREIGN[library]


def test_diffusion_knows_torch_and_errors_alone() -> None:
    used = set().union(*(all_imports(path) for path in (PACKAGE / "diffusion").glob("*.py")))
    assert used <= {"__future__", "torch", "jaxtyping", "math", "dataclasses", "typing", "collections", "pipeline"}
