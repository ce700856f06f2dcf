"""What a model's check finds: one answer per question, and a verdict over all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

import pipeline

Status = Literal["ok", "warning", "failed", "not applicable"]
Verdict = Literal["ok", "usable with warnings", "not usable"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture on the page."""

    label: str
    image: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An inversion and an editor, both with default settings, on this model."""

    inversion: str
    editor: str
    state: Literal["works", "cannot", "no pair"]  # no pair: on no model
    reason: str = ""  # why it cannot, and the way out


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The answer to one question."""

    name: str
    status: Status
    text: str  # what it means and what to do, in a sentence or two
    values: Mapping[str, Any] = field(default_factory=dict)  # JSON-able; names end in their unit
    facts: tuple[tuple[str, str], ...] = ()  # label and value with its unit, for people
    pictures: tuple[Picture, ...] = ()
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """All answers for one model."""

    model: str  # as it was named
    image: str  # what was edited, in words
    checks: tuple[Check, ...]
    seconds: float
    page: Path | None = None  # where the page was written
    json: Path | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst answer decides."""
        found = {check.status for check in self.checks}
        if "failed" in found:
            return "not usable"
        return "usable with warnings" if "warning" in found else "ok"

    def exit_code(self, *, strict: bool = False) -> int:
        """0: usable. 1: not, or, where strict, with warnings."""
        return 1 if self.verdict == "not usable" or (strict and self.verdict != "ok") else 0

    def of(self, name: str) -> Check:
        """One answer. KeyError: it was not asked, as the model did not load."""
        return {check.name: check for check in self.checks}[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the pictures."""
        return {
            "made_by": "shardedit check-model",
            "version": pipeline.__version__,
            "model": self.model,
            "verdict": self.verdict,
            "image": self.image,
            "seconds": round(self.seconds, 3),
            "checks": [
                {"name": check.name, "status": check.status, "text": check.text, **check.values}
                for check in self.checks
            ],
        }
