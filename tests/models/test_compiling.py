"""`model.compile`: the same predictions to rounding, the same bits wherever a row stands, and a clear refusal."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.editor import COMPILED_CALL_SIZE, Editor
from pipeline.engine.backbone import Backbone
from pipeline.engine.calls import NetworkCall
from pipeline.engine.controls import (
    BACKGROUND,
    FOREGROUND,
    GROUPED,
    Add,
    Adds,
    Blend,
    Blends,
    Control,
    GivenClasses,
    Layers,
    Mix,
    Plan,
    Read,
    Reads,
    Record,
    Records,
    Residuals,
    Route,
    TakeFeatures,
    Watch,
)
from pipeline.engine.engine import Engine
from pipeline.errors import RecipeError
from pipeline.models.loading import load_backbone
from pipeline.recipe import ModelConfig, recipe_from
from tests.checkpoints import small_unet
from tests.engine.test_engine import ROOT, bits, neighbours
from tests.golden.replay import TINY_SD
from tests.methods import invert_and_edit, levels, source, sunglasses_and_hat

needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="model.compile needs a C++ compiler"
)
CALL_SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Path(shutil.copytree(TINY_SD, tmp_path_factory.mktemp("compiled") / "model"))
    small_unet(made)
    return made


@pytest.fixture(scope="module")
def compiled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backbone]:
    with pytest.MonkeyPatch.context() as patch:
        # Not what an earlier run of the tests left on disk: the compiler itself is what is tested.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield load_backbone(ModelConfig(name=str(folder), compile=True), device="cpu")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder)), device="cpu")


def call_of(backbone: Backbone, watch: bool = True) -> NetworkCall:
    """Two rows of one image, one of another, one that fills up."""
    rows = [source(backbone, number).latents for number in (1, 1, 2, 1)]
    weights = torch.zeros((4, 1, 77))
    weights[:, 0, 1:3] = 1.0
    prompts = [backbone.encode_text(prompt) for prompt in ("", "red hat", "a dog", "")]
    return NetworkCall(torch.stack(rows), levels(backbone, [401] * 4), prompts, weights if watch else None)


@needs_a_compiler
def test_compiled_calls_predict_and_watch_what_plain_ones_do(compiled: Backbone, plain: Backbone) -> None:
    found, expected = compiled.denoise(call_of(compiled)), plain.denoise(call_of(plain))
    torch.testing.assert_close(found.predictions.noise, expected.predictions.noise, atol=1e-4, rtol=1e-4)
    assert found.attention is not None
    assert expected.attention is not None
    torch.testing.assert_close(found.attention, expected.attention, atol=1e-5, rtol=1e-4)
    unwatched = compiled.denoise(call_of(compiled, watch=False))
    assert unwatched.attention is None
    assert torch.equal(unwatched.predictions.noise, found.predictions.noise)


@needs_a_compiler
def test_a_compiled_image_has_the_same_bits_alone_and_beside_neighbours(compiled: Backbone) -> None:
    alone = bits(
        Engine(compiled, call_size=CALL_SIZE).run_one(invert_and_edit(source(compiled, 1), sunglasses_and_hat()))
    )
    generators = [*neighbours(compiled), invert_and_edit(source(compiled, 1), sunglasses_and_hat())]
    finished = {one.index: one for one in Engine(compiled, call_size=CALL_SIZE).run(generators)}
    assert not [one.error for one in finished.values() if one.error]
    assert bits(finished[3].value) == alone


HALF = torch.zeros((12, 12), dtype=torch.int64) + BACKGROUND
HALF[:, :6] = FOREGROUND
EVERY_LAYER = Layers()
MIX = Mix(row=1, source=0, take=torch.eye(77) * 0.5, keep=torch.full((77,), 0.25))
ROUTE = Route(row=1, query=0, key=0, layers=Layers(place="up"))
WATCH = Watch(0, torch.ones((2, 77)))
READ = Read(row=1, sources=(0,), layers=EVERY_LAYER, classes=GivenClasses(HALF, HALF[None]))
BLOCK, FEATURES = ("up", 0), Residuals(factor=4, index_in_block=1)
ADD = Add(row=1, where=BLOCK, directions=torch.ones((1, 16)), maps=torch.ones((1, 3, 3)), relative=True)
RECORD = Record(0, BLOCK)
BLEND = Blend(
    row=1, layers=EVERY_LAYER, sources=torch.zeros(9).long(), places=torch.arange(9), shares=torch.full((9,), 0.5)
)
OTHER_READ = Read(row=0, sources=(1,), layers=EVERY_LAYER)
KINDS: dict[str, tuple[Plan, list[list[tuple[Any, ...]]]]] = {
    "grouped": (GROUPED, [[(MIX,), ()], [(ROUTE, WATCH), (MIX, ROUTE)], [(), (WATCH,)]]),
    "all that is left": (
        Plan(
            reads=(Reads(layers=EVERY_LAYER, slots=2, classes="given"),),
            takes=(FEATURES,),
            blends=(Blends(layers=EVERY_LAYER, slots=1),),
            adds=(Adds(where=BLOCK, slots=1),),
            records=(Records(where=BLOCK, slots=1),),
        ),
        [[(READ,), (ADD,)], [(READ, OTHER_READ, RECORD), (BLEND, TakeFeatures(1, 0, FEATURES))]],
    ),
}


@needs_a_compiler
@pytest.mark.slow  # compiles each anew
@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_a_kind_are_one_graph_and_do_what_plain_ones_do(
    kind: str, compiled: Backbone, plain: Backbone
) -> None:
    plan, contents = KINDS[kind]
    free = compiled.denoise(dataclasses.replace(call_of(compiled, watch=False), plan=plan, group=2))
    graphs = counters["stats"]["unique_graphs"]
    for groups in contents:
        controls = [(2 * number, Control(parts, plan)) for number, parts in enumerate(groups)]
        watch = torch.zeros((4, plan.sums, 77))
        for start, control in controls:
            for part in control.parts:
                if isinstance(part, Watch):
                    watch[start + part.row, : len(part.weights)] = part.weights
        watches = any(control.watches for _, control in controls)
        call = dataclasses.replace(
            call_of(compiled, watch=False), watch=watch if watches else None, controls=controls, plan=plan, group=2
        )
        found, expected = compiled.denoise(call), plain.denoise(call)
        torch.testing.assert_close(found.predictions.noise, expected.predictions.noise, atol=1e-4, rtol=1e-4)
        for where, written in expected.recorded.items():
            torch.testing.assert_close(found.recorded[where][:1], written[:1], atol=1e-4, rtol=1e-4)
        assert (found.attention is None) == (expected.attention is None) == (not watches)
        if found.attention is not None and expected.attention is not None:
            torch.testing.assert_close(found.attention, expected.attention, atol=1e-5, rtol=1e-4)
        changed = {
            start + part.row for start, control in controls for part in control.parts if part not in (WATCH, RECORD)
        }
        different = {
            row for row in range(4) if not torch.equal(found.predictions.noise[row], free.predictions.noise[row])
        }
        assert different == changed
    assert counters["stats"]["unique_graphs"] == graphs


@needs_a_compiler
@pytest.mark.slow  # compiles everything anew
def test_a_second_process_compiles_to_the_same_bits(compiled: Backbone, folder: Path, tmp_path: Path) -> None:
    script = (
        "import hashlib, torch; from tests.models.test_compiling import *;"
        f"torch.set_num_threads({torch.get_num_threads()});"
        f"b = load_backbone(ModelConfig(name={str(folder)!r}, compile=True), device='cpu');"
        "print(hashlib.sha256(b.denoise(call_of(b)).predictions.noise.numpy().tobytes()).hexdigest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    ).stdout
    here = compiled.denoise(call_of(compiled)).predictions.noise.numpy().tobytes()
    assert printed.strip() == hashlib.sha256(here).hexdigest()


@needs_a_compiler
def test_the_front_door_pads_compiled_calls_to_one_size(folder: Path) -> None:
    editor = Editor.load(str(folder), compile=True)
    assert (editor.engine.call_size, editor.engine.pad) == (COMPILED_CALL_SIZE, True)
    assert not Editor.load(str(folder)).engine.pad


def test_a_machine_without_a_compiler_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    script = (
        "from pipeline.models.loading import load_backbone; from pipeline.recipe import ModelConfig\n"
        "from pipeline.errors import ModelError\n"
        "try:\n"
        f"    load_backbone(ModelConfig(name={str(folder)!r}, compile=True), device='cpu')\n"
        "except ModelError as error: print(error)"
    )
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert "torch cannot compile for cpu here" in ran.stdout
    assert "Install a C++ compiler" in ran.stdout


def test_a_model_without_networks_is_not_compiled() -> None:
    with pytest.raises(RecipeError, match="no networks to compile"):
        recipe_from(
            {"source": {"shards": "-"}, "model": {"name": "analytic", "compile": True}, "sink": {"folder": "-"}}
        )
