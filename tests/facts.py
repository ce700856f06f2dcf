"""What the tests over all methods know of one: it says so itself, as `FACTS` in its own test module."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class InversionFacts:
    """Of an inversion: `FACTS = InversionFacts(rows=...)` in tests/inversion/test_NAME.py."""

    rows: int
    """Network rows per step of one image with a source prompt, at most: those of the smallest layout that loses
    nothing. Under the settings of `quick`."""
    stops_early: bool = False  # and takes fewer where it has arrived
    quick: Mapping[str, Any] = field(default_factory=dict)  # settings by which something happens within three steps
    guidance: float = 1.0  # of its source; an editor that shall change nothing guides as much
    guided_by: Mapping[str, Any] = field(default_factory=dict)  # settings that make it so, where there are any


@dataclass(frozen=True, slots=True, kw_only=True)
class EditorFacts:
    """Of an editor: `FACTS = EditorFacts(rows=...)` in tests/editing/test_NAME.py."""

    rows: int
    """Network rows per step of one image with a source prompt and one target, after any inversion, at most: those of
    the smallest layout that loses nothing. Under the settings of `quick`."""
    rows_after: Mapping[str, int] = field(default_factory=dict)  # fewer, after these inversions
    rows_once: int = 0  # and these, whatever the number of steps
    quick: Mapping[str, Any] = field(default_factory=dict)  # settings by which something happens within three steps
    unguided: Mapping[str, Any] = field(default_factory=dict)  # settings without which guidance 1 is refused, or edits
    served_elsewhere: bool = False  # by a model that reads the image itself, or by a server: not by those of all pairs
    finds_region: bool = False  # one of its own, with blend words or a concept, and needs no user's mask for it

    def rows_of(self, inversion: str, steps: int) -> int:
        """Network rows of an edit, at most."""
        return steps * self.rows_after.get(inversion, self.rows) + self.rows_once


def inversion_facts(name: str) -> InversionFacts:
    """What an inversion's tests say of it."""
    return _said("inversion", name, InversionFacts)


def editor_facts(name: str) -> EditorFacts:
    """What an editor's tests say of it."""
    return _said("editing", name, EditorFacts)


def _said(package: str, name: str, kind: type[Any]) -> Any:
    module = f"tests.{package}.test_{name}"
    facts = getattr(importlib.import_module(module), "FACTS", None) if find_spec(module) else None
    where = f"{module.replace('.', '/')}.py"
    assert isinstance(facts, kind), f"{where} does not say what {name} costs: add FACTS = {kind.__name__}(rows=...)"
    return facts
