"""Copies of the tiny checkpoint that a test may spoil: what loading must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ModelError
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path, match: str) -> None:
    """Loading the folder fails, and the reason matches."""
    with pytest.raises(ModelError, match=match):
        load_backbone(ModelConfig(name=str(folder)), device="cpu")
