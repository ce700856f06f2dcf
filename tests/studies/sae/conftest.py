"""Recordings and a library that the tests of sparse autoencoders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.studies.sae.labelling import label
from pipeline.studies.sae.training import train
from tests.studies.sae.jobs import RECORD, label_config, recipe_data, train_config, write_prompts


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of six images, in part and whole."""
    folder = tmp_path_factory.mktemp("made")
    write_prompts(folder / "in")
    for out, record in (("some", RECORD), ("whole", {**RECORD, "positions": None})):
        driver.run(recipe_from(recipe_data(folder, out, record)), progress="off")
    return folder


@pytest.fixture(scope="session")
def library(made: Path) -> Path:
    """Autoencoders of these recordings, labelled."""
    train(train_config(made, made / "library"))
    label(label_config(made, made / "library"))
    return made / "library"
