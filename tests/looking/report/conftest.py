"""Runs to report on: drawn faces and drawn edits, written by the product's own writers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.engine.backbone import ModelRecord
from pipeline.evaluation.metrics import figures
from pipeline.models.demo.world import Scene, caption, changed_region, draw, edited
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import Edited, Rejected
from pipeline.samples import Sample, Unit, UnitInput
from pipeline.writing.commit import commit
from pipeline.writing.finish import finish_unit
from pipeline.writing.manifest import Measured
from pipeline.writing.rows import encode_outcome
from pipeline.writing.run_record import run_record, write_run_record

MODEL = ModelRecord(name="demo", revision="", digest="0123456789abcdef", dtype="float32", device="cpu")
EDITS = {
    "shades": {"concepts": [{"prompt": "sunglasses"}]},
    "hat": {"concepts": [{"prompt": "a red hat"}, {"prompt": "a smile", "guidance_scale": -5}]},
}
CHANGES = {"shades": {"sunglasses": True}, "hat": {"hat": "red", "mouth": "straight"}}


def png(pixels: np.ndarray) -> bytes:
    """Encoded pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def a_sample(number: int, text: str, size: int = 128) -> tuple[Sample, Scene]:
    """A drawn face."""
    scene = Scene.random(np.random.default_rng(number))
    data = png(draw(scene, size))
    return Sample(
        id=f"faces.tar/{number:04d}", shard="faces.tar", key=f"{number:04d}", index=number, image=data, caption=text
    ), scene


def an_edit(sample: Sample, scene: Scene, recipe: Recipe, edit: str, method: str) -> Edited:
    """What a good model would make of it: the drawn change, a little noise everywhere."""
    after = edited(scene, **CHANGES[edit])
    original, target = draw(scene), draw(after)
    rng = np.random.default_rng(sample.index)
    noise = rng.normal(0, 1 + 2 * rng.random(), original.shape)
    image = np.clip(target + noise, 0, 255).astype(np.uint8)
    region = changed_region(scene, after)
    mask = region if region.any() else None  # a face that wears sunglasses already: nothing is edited
    round_trip = np.clip(original + noise / 2, 0, 255).astype(np.uint8)
    return Edited(
        sample=sample,
        edit=edit,
        method=method,
        request=recipe.edits[edit],
        image=image,
        original=original,
        masks=(mask,) * len(recipe.edits[edit].concepts),
        mask=mask,
        seed=1,
        figures=figures(original, round_trip, image, mask),
    )


def write_unit(recipe: Recipe, chunk: int, images: int, text: str, failing: int) -> None:
    """Edit and commit one unit, of whose images the first `failing` could not be decoded."""
    samples = [a_sample(chunk * images + at, text) for at in range(images)]
    encoded = []
    for at, (sample, scene) in enumerate(samples):
        for edit in recipe.edits:
            for method in recipe.all_methods:
                outcome = (
                    Rejected(
                        sample=sample,
                        edit=edit,
                        method=method,
                        stage="decode",
                        error_class="DecodeError",
                        message=f"the image of {sample.id} ends after {100 + at} bytes & <b>is cut</b>",
                    )
                    if at < failing
                    else an_edit(sample, scene, recipe, edit, method)
                )
                encoded.append(encode_outcome(outcome, recipe, MODEL, 16))
    unit = Unit(
        id=f"faces-3fa2b1c4-{chunk:05d}",
        shard="faces.tar",
        chunk=chunk,
        start=chunk * images,
        stop=(chunk + 1) * images,
        is_last=True,
    )
    rows = UnitInput(unit=unit, shard_size=1000, shard_etag="", rows=tuple(sample for sample, _ in samples))
    finished = finish_unit(
        rows,
        encoded,
        recipe,
        generation=1,
        model_digest=MODEL.digest,
        call_size=16,
    ).with_measured(Measured(worker_seconds=4.0, workers=1, network_rows=1000))
    commit(finished, recipe.sink, lambda: None)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Recipe]:
    """Write a run's folder and return its recipe; see the keyword arguments."""

    def make(
        *,
        images: int = 4,
        units: int = 1,
        failing: int = 0,
        text: str | None = None,
        include_input: bool = False,
        file_format: str = "parquet",
        edits: dict[str, object] = EDITS,
        methods: dict[str, object] | None = None,
        summary: bool = True,
    ) -> Recipe:
        recipe = recipe_from(
            {
                "source": {"shards": "in/*.tar", "storage_options": {"secret": "hunter2"}},
                "edits": edits,
                "methods": methods or {},
                "sink": {"folder": str(tmp_path / "faces"), "format": file_format, "include_input": include_input},
            }
        )
        write_run_record(run_record(recipe, [], MODEL, 16, 1), recipe.sink)
        rng = np.random.default_rng(0)
        for chunk in range(units):
            write_unit(recipe, chunk, images, text if text is not None else caption(Scene(), rng), failing)
        if summary:
            said = {"images_per_second": 2.5, "complete": True}
            Path(recipe.sink.folder, "summary.json").write_text(json.dumps(said), encoding="utf-8")
        return recipe

    return make
