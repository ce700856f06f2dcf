"""Templates of concepts: what they say of codes, as rows of a table, and from labelling to an edit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.errors import ModelError, RecipeError
from pipeline.interventions import Template
from pipeline.reading.libraries import read_library
from pipeline.reading.templates import row_of, template_of
from pipeline.recipe import recipe_from
from pipeline.running import driver
from pipeline.studies.sae.codes import CodedImages
from pipeline.studies.sae.labelling import label
from pipeline.studies.sae.templates import templates_of
from pipeline.writing.parquet import render_parquet
from tests.studies.sae.jobs import IMAGES, label_config, recipe_data, table_of

FEATURES, GRID = 6, (2, 2)


def dense(one: Template) -> Tensor:
    """(F, h', w')."""
    found = torch.zeros((FEATURES, *GRID))
    found[list(one.features)] = one.maps
    return found


def images_with(parts: dict[str, Tensor], shows: Tensor) -> CodedImages:
    """Codes that are the sum of what each tag puts (F, h', w'), for images that show tags (images, T)."""
    codes = torch.einsum("it,tfp->ipf", shows, torch.stack([*parts.values()]).flatten(2)) + 1.0
    count, places, _ = codes.shape
    return CodedImages(
        ids=tuple(map(str, range(count))),
        grid=GRID,
        features=torch.arange(FEATURES).expand(count * places, FEATURES),
        values=codes.flatten(0, 1),
        num_features=FEATURES,
        tags=tuple(parts),
        covered=shows.repeat_interleave(places, dim=0),
    )


def planted() -> tuple[dict[str, Tensor], CodedImages]:
    """A hat, and a beard that three of four who wear a hat have, and one of four who do not."""
    drawn = torch.Generator().manual_seed(0)
    parts = {name: torch.rand((FEATURES, *GRID), generator=drawn) for name in ("beard", "hat")}
    hat = torch.arange(400) % 2 == 0
    beard = torch.rand(400, generator=drawn) < torch.where(hat, 0.75, 0.25)
    return parts, images_with(parts, torch.stack([beard, hat], dim=1).float())


def test_a_template_is_what_a_tag_adds_at_each_place_and_nothing_of_what_comes_along() -> None:
    parts, images = planted()
    found = dict(templates_of(images, FEATURES))
    for name, expected in parts.items():
        torch.testing.assert_close(dense(found[name]), expected, rtol=0.05, atol=0.02)


def test_of_each_place_the_largest_codes_are_kept() -> None:
    _, images = planted()
    (_, whole), _ = templates_of(images, FEATURES)
    (_, small), _ = templates_of(images, 2)
    kept = dense(small)
    assert torch.equal((kept != 0).sum(dim=0), torch.full(GRID, 2))
    assert torch.equal(kept, torch.where(dense(whole) >= dense(whole).topk(2, dim=0).values[-1], dense(whole), 0))


def test_a_template_is_the_same_from_its_row() -> None:
    one = Template(features=(1, 4), maps=torch.tensor([[[0.0, -2.0], [0.0, 0.0]], [[1.0, 0.0], [0.5, 3.0]]]))
    row = row_of(one)
    assert len(row["codes"]) == 4, "zeros are not stored"
    back = template_of(row, FEATURES)
    assert back.features == one.features
    assert torch.equal(back.maps, one.maps)
    for changes, says in (
        ({"places": [0, 1, 2, 4]}, "place 4, and its map has 4"),
        ({"features": [1, 4, 4, 6]}, "feature 6, and the autoencoder has 6"),
        ({"codes": [1.0]}, "1 codes have 4 features"),
        ({"codes": [1.0, 2.0, float("nan"), 1.0]}, "not finite"),
    ):
        with pytest.raises(ValueError, match=says):
            template_of({**row, **changes}, FEATURES)


def numbered(image: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
    """What a labeller says: the left half, and the right one of all images but the last."""
    left = np.arange(image.shape[1])[None] < np.full((image.shape[0], 1), image.shape[1] // 2)
    return {"left": left} if prompt.endswith(str(IMAGES - 1)) else {"left": left, "most": ~left}


def by_template(made: Path, out: str, library: Path, **intervention: Any) -> Any:
    wanted = {"add": ["most"], "form": "template", **intervention}
    return recipe_from(
        recipe_data(
            made,
            out,
            edits={"target_prompt": "a cat", "interventions": [wanted]},
            source={"shards": str(made / "in"), "edit": "none"},
            editing={"method": "concepts", "guidance_scale": 2.0, "autoencoders": str(library), "reach": 0.3},
        )
    )


@pytest.mark.timeout(240)
def test_a_library_is_labelled_with_templates_and_an_edit_writes_them(
    made: Path, library: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(library, tmp_path / "library")
    config = label_config(made, folder, labels=f"{__name__}:numbered", template_size=4)
    label(label_config(made, folder, labels=config.labels))
    with pytest.raises(RecipeError, match=r"the concept 'most' of .* has no template"):
        driver.run(by_template(made, "refused", folder), progress="off")
    label(config)
    rows = pq.read_table(folder / "templates.parquet").to_pylist()
    assert [row["concept"] for row in rows] == ["most"] * 4, "by every autoencoder; the left half is in every image"
    for name, strength in (("nothing", 0.0), ("template", 3.0)):
        assert driver.run(by_template(made, name, folder, strength=strength), progress="off").failed == 0
    before, after = (table_of(made / name) for name in ("nothing", "template"))
    assert all(one["image"]["bytes"] != other["image"]["bytes"] for one, other in zip(before, after, strict=True))
    schema = pq.read_schema(folder / "templates.parquet")
    damaged = render_parquet([{**row, "codes": row["codes"][1:]} for row in rows], schema)
    (folder / "templates.parquet").write_bytes(damaged)
    read_library.cache_clear()
    with pytest.raises(ModelError, match=r"the template of .* is damaged"):
        read_library(str(folder))
    label(label_config(made, folder, labels=config.labels))
    assert read_library(str(folder)).entries[0].concepts["most"].template is None, "those of before are gone"
