"""What is known before a run ends it before anything is written, in `edit` and in `plan` alike."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from diffusers import UNet2DConditionModel

from pipeline.errors import RecipeError, SinkError
from pipeline.looking.planning import plan
from pipeline.models.outline import outline_of
from pipeline.recipe import Recipe, recipe_from
from pipeline.running.driver import run
from pipeline.settings.sections import ModelConfig
from pipeline.writing.lock import DriverLock
from tests.golden.replay import TINY_SD
from tests.runs import png

HAT = {"concepts": [{"prompt": "a hat"}]}
LAYOUTS = ("tar", "parquet", "folder")


def a_recipe(folder: Path, **source: Any) -> Recipe:
    return recipe_from(
        {
            "source": {"shards": str(folder / "in"), **source},
            "edits": HAT,
            "model": {"name": "analytic", "size": 32},
            "inversion": {"method": "ddpm", "num_steps": 2},
            "sink": {"folder": str(folder / "out")},
            "run": {"engine": "local", "call_size": 4},
        }
    )


def write_rows(folder: Path, layout: str, texts: dict[str, str]) -> Path:
    """Three images, each with these texts under these names."""
    (folder / "in").mkdir(exist_ok=True)
    if layout == "parquet":
        columns = {name: [text] * 3 for name, text in texts.items()}
        pq.write_table(
            pa.table({"image": [png(number) for number in range(3)], **columns}), folder / "in" / "a.parquet"
        )
        return folder
    files = {f"im{number}.{name}": text.encode() for number in range(3) for name, text in texts.items()}
    files |= {f"im{number}.png": png(number) for number in range(3)}
    if layout == "folder":
        for name, content in files.items():
            (folder / "in" / name).write_bytes(content)
        return folder
    with tarfile.open(folder / "in" / "a.tar", "w") as tar:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_caption_that_no_row_has_while_others_are_there_is_named(layout: str, tmp_path: Path, capfd: Any) -> None:
    recipe = a_recipe(write_rows(tmp_path, layout, {"txt": "a cat", "text": "a dog"}), caption="capton")
    (note,) = [note for note in plan(recipe, probe=False).notes if "source.caption" in note]
    assert "no row has text under 'capton' (3 looked at); rows have: txt, text." in note.replace(
        "text, txt", "txt, text"
    )
    assert run(recipe, progress="lines").done == 3
    assert note in capfd.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_prompt_that_no_row_has_ends_the_run_before_it_begins(layout: str, tmp_path: Path) -> None:
    write_rows(tmp_path, layout, {"text": "a cat"})
    recipe = a_recipe(tmp_path, caption="cap", caption_is_source_prompt=True)
    for ask in (lambda: plan(recipe, probe=False), lambda: run(recipe, progress="off")):
        with pytest.raises(RecipeError, match=r"source\.caption: no row has text under 'cap'.*rows have: text\."):
            ask()
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("texts", "source"),
    [({"txt": "a cat", "cap": "a dog"}, {"caption": "cap"}), ({"url": "http://a"}, {}), ({}, {"caption": "cap"})],
    ids=["found", "a text that is none", "no text at all"],
)
def test_captions_that_are_found_or_were_not_asked_for_are_no_news(
    texts: dict[str, str], source: dict[str, str], tmp_path: Path
) -> None:
    recipe = a_recipe(write_rows(tmp_path, "parquet", texts), **source)
    assert not [note for note in plan(recipe, probe=False).notes if "source.caption" in note]


def test_a_plan_refuses_the_folders_that_edit_refuses_and_writes_nothing(tmp_path: Path) -> None:
    recipe = a_recipe(write_rows(tmp_path, "parquet", {}))
    plan(recipe, probe=False)
    assert not (tmp_path / "out").exists()

    run(recipe, progress="off")
    again = plan(recipe, probe=False)
    assert any("this run has begun" in note for note in again.notes)
    other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 1})})
    before = sorted((tmp_path / "out").rglob("*"))
    with DriverLock(recipe.sink, on_lost=print), pytest.raises(SinkError, match="is being written by another driver"):
        plan(recipe, probe=False)
    for ask in (lambda: plan(other, probe=False), lambda: run(other, progress="off")):
        with pytest.raises(SinkError, match=r"run\.seed: was 0, is 1"):
            ask()
    assert [path for path in sorted((tmp_path / "out").rglob("*")) if "_lock" not in path.parts] == [
        path for path in before if "_lock" not in path.parts
    ]

    (tmp_path / "file").write_bytes(b"")
    on_a_file = recipe.model_copy(update={"sink": recipe.sink.model_copy(update={"folder": f"{tmp_path}/file/out"})})
    with pytest.raises(SinkError, match="is no folder"):
        plan(on_a_file, probe=False)


@pytest.mark.parametrize("below", ["", "/edited"])
def test_results_that_would_be_read_as_input_are_refused(below: str, tmp_path: Path) -> None:
    recipe = a_recipe(write_rows(tmp_path, "parquet", {}))
    over = recipe.model_copy(update={"sink": recipe.sink.model_copy(update={"folder": f"{tmp_path}/in{below}"})})
    for ask in (lambda: plan(over, probe=False), lambda: run(over, progress="off")):
        with pytest.raises(SinkError, match="results would be read as input"):
            ask()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.parquet"]


def settings_for(model: Path | str, folder: Path, edit: dict[str, Any], **sections: Any) -> Recipe:
    return recipe_from(
        {
            "source": {"shards": str(write_rows(folder, "parquet", {}) / "in")},
            "edits": edit,
            "model": {"name": str(model)},
            "sink": {"folder": str(folder / "out")},
            **sections,
        }
    )


def refused(settings: Recipe, match: str) -> None:
    for ask in (lambda: plan(settings, probe=False), lambda: run(settings, progress="off")):
        with pytest.raises(RecipeError, match=match):
            ask()
    assert not Path(settings.sink.folder).exists()


def test_a_layer_that_the_model_lacks_is_refused_by_its_configuration(tmp_path: Path) -> None:
    """Counted as the loaded UNet counts them."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(TINY_SD / "unet"))
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in unet.modules())
    offers = outline_of(ModelConfig(name=str(TINY_SD))).offers
    assert offers is not None
    assert len(offers.openings.layers) == blocks
    settings = settings_for(
        TINY_SD,
        tmp_path,
        {"target_prompt": "a dog"},
        inversion={"method": "ddim", "num_steps": 6},
        editing={"method": "masactrl", "start_layer": blocks},
    )
    refused(settings, f"start_layer names layer {blocks}, and the model's {blocks} count")


BLEND = {
    "inversion": {"method": "ddim", "num_steps": 6},
    "editing": {"method": "prompt_to_prompt"},
}


def test_a_word_behind_what_the_text_encoder_reads_is_refused(tmp_path: Path) -> None:
    def blending(length: int) -> dict[str, Any]:
        prompt = " ".join(["red"] * length)
        return {
            "source_prompt": f"{prompt} cat",
            "target_prompt": f"a cat and {prompt} dog",
            "blend_words": {"source": ["cat"], "target": ["dog"]},
        }

    (tokenizer,) = outline_of(ModelConfig(name="demo")).tokenizers
    fits = tokenizer.model_max_length - 2 - len(tokenizer("a cat and dog").input_ids) + 2
    assert settings_for("demo", tmp_path, blending(fits), **BLEND)  # or the next one shows nothing
    plan(settings_for("demo", tmp_path, blending(fits), **BLEND), probe=False)
    refused(settings_for("demo", tmp_path, blending(fits + 9), **BLEND), "the word 'dog' stands beyond what the text")


@pytest.mark.parametrize("channels", [4, 9])
def test_a_checkpoint_and_a_method_that_do_not_fit_are_refused(channels: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_SD, model)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": channels}))
    edit = {"source_prompt": "a cat", "target_prompt": "a dog"}
    inpaint = {
        "inversion": {"method": "noise", "num_steps": 6},
        "editing": {"method": "fast_diffedit", "backend": "inpaint"},
    }
    plain = {"inversion": {"method": "ddim", "num_steps": 6}, "editing": {"method": "cfg"}}
    unfit, text = (inpaint, "is a plain one") if channels == 4 else (plain, "is an inpainting checkpoint")
    refused(settings_for(model, tmp_path, edit, **unfit), text)
    offers = outline_of(ModelConfig(name=str(model))).offers
    assert offers is not None
    assert ("inpaint" in offers.inputs) == (channels == 9)
