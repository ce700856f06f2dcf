"""A plan counts what the run then does, and writes nothing."""

from __future__ import annotations

import io
import json
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.engine.calls import NetworkCall
from pipeline.errors import SourceError
from pipeline.looking import planning, probe
from pipeline.looking.counting import RowCounter
from pipeline.looking.planning import plan, seconds_for
from pipeline.looking.probe import Probe
from pipeline.models.analytic import AnalyticBackbone
from pipeline.models.demo.shards import write_demo_shards
from pipeline.reading.shards import Shard, shard_slug, unit_id
from pipeline.recipe import Recipe, recipe_from
from pipeline.records import EditRequest
from pipeline.running.todo import Todo, find_todo
from pipeline.writing.folding import folded_bytes
from pipeline.writing.manifest import Counts, Manifest, Measured, manifest_path, shard_path
from pipeline.writing.run_record import run_record, write_run_record
from tests.methods import levels
from tests.places import Place
from tests.writing.making import MODEL

STEPS = 6
HAT = {"concepts": [{"prompt": "a hat"}]}


def a_recipe(folder: Path, **sections: object) -> Recipe:
    settings = {
        "source": {"shards": str(folder / "in" / "*.tar")},
        "edits": HAT,
        "model": {"name": "analytic"},
        "sink": {"folder": str(folder / "out")},
        "run": {"engine": "local", "unit_size": 4, "call_size": 8},
        **sections,
    }
    if "methods" not in settings:
        settings = {"inversion": {"method": "ddpm", "num_steps": STEPS}} | settings
    return recipe_from(settings)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Twelve drawn faces in two shards; numbers 3, 7 and 11 bring an edit of their own."""
    write_demo_shards(tmp_path / "in", 12, shard_size=8, size=64)
    return tmp_path


def rows_of(recipe: Recipe, *requests: dict[str, object], masked: bool = False) -> int:
    named = {f"edit{at}": EditRequest.model_validate(request) for at, request in enumerate(requests)}
    return RowCounter(recipe).rows(named, masked=masked)


def test_a_plan_counts_what_the_run_then_does(faces):
    from pipeline.running.driver import run

    recipe = a_recipe(faces, edits={"hat": HAT, "both": {"concepts": [{"prompt": "a hat"}, {"prompt": "sunglasses"}]}})
    made = plan(recipe)
    assert not (faces / "out").exists(), "planning writes nothing"
    summary = run(recipe, progress="off")
    assert (made.images, made.results, made.network_rows) == (12, summary.planned, summary.network_rows)
    assert made.results == 9 * 2 + 3
    assert made.shards == 2
    assert made.bytes_in == sum(path.stat().st_size for path in (faces / "in").iterdir())
    assert made.seconds is not None
    assert made.seconds > 0
    assert made.bytes_out is not None
    assert 0.5 < made.bytes_out / summary.output_bytes < 2.0


def test_a_plan_of_a_pool_that_may_change_counts_on_its_fewest_workers_and_says_so(faces):
    one, some = (plan(a_recipe(faces, run={"workers": workers})) for workers in (1, {"min": 1, "max": 4}))
    assert some.workers == one.workers == 1
    assert "time counts on 1 worker(s), run.workers.min; 4, run.workers.max, take 25% of it" in some.notes
    assert not [note for note in one.notes if "run.workers" in note]


def test_a_plan_without_a_probe_loads_no_model_and_estimates_no_time(faces, monkeypatch):
    monkeypatch.setattr(planning, "probe_model", lambda *_: pytest.fail("the model was loaded"))
    made = plan(a_recipe(faces), probe=False)
    assert made.seconds is None
    assert made.bytes_out is None
    assert made.network_rows == 12 * STEPS * 3
    assert json.loads(json.dumps(made.as_dict()))["results"] == 12


def test_rows_are_those_of_the_methods_formulas(tmp_path):
    recipe = a_recipe(tmp_path)
    one, two = HAT, {"concepts": [{"prompt": "a hat"}, {"prompt": "a beard", "warmup_steps": 2, "cooldown_steps": 4}]}
    assert rows_of(recipe, one) == STEPS + STEPS * 2
    assert rows_of(recipe, two) == STEPS + STEPS * 2 + 2
    assert rows_of(recipe, one, two) == STEPS + STEPS * 2 + STEPS * 2 + 2, "one inversion serves both edits"
    assert rows_of(recipe, {"concepts": [{"prompt": "a hat", "warmup_steps": 4}]}) == STEPS + 2 * 2
    assert rows_of(recipe, {"concepts": [{"prompt": "a hat", "guidance_scale": 0}]}) == STEPS
    assert rows_of(recipe, {"concepts": []}) == STEPS


def test_methods_that_agree_on_the_inversion_share_it_and_others_do_not(tmp_path):
    ddpm = {"inversion": {"method": "ddpm", "num_steps": STEPS}}
    two_masks = {name: {**ddpm, "editing": {"method": "ledits_pp", "mask": name}} for name in ("noise", "attention")}
    assert rows_of(a_recipe(tmp_path, methods=two_masks), HAT) == STEPS + 2 * STEPS * 2
    other = {**two_masks, "short": {"inversion": {"method": "ddpm", "num_steps": 2}}}
    assert rows_of(a_recipe(tmp_path, methods=other), HAT) == STEPS + 2 * STEPS * 2 + 2 + 2 * 2


def test_ledits_pp_inverts_under_the_prompt_that_it_starts_from_whoever_shares_the_edit(tmp_path):
    """And shares that inversion with nobody who needs the source prompt's."""
    ddpm = {"method": "ddpm", "num_steps": STEPS}
    both = {
        "ledits_pp": {"inversion": ddpm},
        "cfg": {"inversion": ddpm, "editing": {"method": "cfg"}},
    }
    target = {**HAT, "target_prompt": "a cat"}
    recipe = a_recipe(tmp_path, methods=both, edits=target)
    assert rows_of(recipe, target) == STEPS + 2 * STEPS + 2 * STEPS, "one inversion serves both"
    described = {**target, "source_prompt": "a dog"}
    assert rows_of(recipe, described) == (STEPS + 2 * STEPS) + (2 * STEPS + 2 * STEPS)
    alone = a_recipe(tmp_path)
    late = {"concepts": [{"prompt": "a hat", "warmup_steps": 4}], "source_prompt": "a dog", "negative_prompt": "snow"}
    assert rows_of(alone, late) == STEPS + 2 * 2, "steps before the first warm-up replay what was stored"


def test_prompts_count_by_being_equal_not_by_what_they_say(tmp_path):
    recipe = a_recipe(tmp_path)
    counter = RowCounter(recipe)
    for text in ("a hat", "sunglasses", "a very long prompt of many words"):
        counter.rows({"edit": EditRequest.model_validate({"concepts": [{"prompt": text}]})})
    assert len(counter.known) == 1
    counter.rows({"edit": EditRequest.model_validate({**HAT, "source_prompt": "a face"})})
    counter.rows({"edit": EditRequest.model_validate({**HAT, "source_prompt": "a face", "negative_prompt": "a face"})})
    assert len(counter.known) == 3


def test_a_request_that_a_method_refuses_costs_nothing(tmp_path):
    recipe = a_recipe(
        tmp_path,
        edits={"target_prompt": "a cat"},
        inversion={"method": "noise", "num_steps": STEPS},
        editing={"method": "cfg"},
    )
    assert rows_of(recipe, {"target_prompt": "a cat"}) == STEPS * 2
    assert rows_of(recipe, HAT) == 0


def test_a_large_source_is_estimated_and_says_so(faces, monkeypatch):
    monkeypatch.setattr(planning, "READ_ROWS", 4)
    monkeypatch.setattr(planning, "COUNTED_SHARDS", 1)
    made = plan(a_recipe(faces), probe=False)
    assert any("estimated from the first 4 rows" in note for note in made.notes)
    assert any("estimated from 1 of 2 shards" in note for note in made.notes)
    assert 9 <= made.images <= 15
    assert made.network_rows == made.images * STEPS * 3


def test_rows_without_a_usable_edit_are_announced(faces):
    made = plan(a_recipe(faces, edits={}), probe=False)
    assert any("9 of 12 rows cannot be edited as asked: no usable edit" in note for note in made.notes)
    assert made.results == 12
    assert made.network_rows == 3 * STEPS * 3


def test_rows_that_a_method_cannot_serve_are_counted_by_reason_and_cost_nothing(tmp_path):
    """By what the rows' own prompts say: the reasons name no prompt, and rows alike but for a word are kept apart."""
    wanted = {"source_prompt": "a cat", "blend_words": {"target": ["dog"]}}
    targets = ["a dog"] * 3 + ["a cow"] * 2 + [""]
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    rows = {
        "image": [buffer.getvalue()] * len(targets),
        "edit": [json.dumps({**wanted, "target_prompt": target}) for target in targets],
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "rows.parquet")
    pair = {
        "inversion": {"method": "direct", "num_steps": STEPS},
        "editing": {"method": "prompt_to_prompt"},
        "source": {"shards": str(tmp_path / "in")},
    }
    recipe = a_recipe(tmp_path, edits={}, **pair)
    made = plan(recipe, probe=False)
    (note,) = [note for note in made.notes if "cannot be edited" in note]
    assert "3 of 6 rows cannot be edited as asked: blend word 'dog' is not in the target prompt (3)" in note
    assert "no target_prompt (1)" in note
    assert made.network_rows == 3 * (STEPS + 3 * STEPS)


def test_a_plan_says_why_none_of_the_first_rows_can_be_edited(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [b"no image"]}), tmp_path / "in" / "rows.parquet")
    made = plan(a_recipe(tmp_path, source={"shards": str(tmp_path / "in")}))
    assert any("none of the first rows can be edited: the image" in note for note in made.notes), made.notes


def test_a_slow_model_is_cut_off_and_still_gives_an_estimate(faces, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.0)
    made = plan(a_recipe(faces))
    assert made.probe is not None
    assert made.probe.images == 0
    assert made.seconds is not None
    assert made.seconds > 0
    assert made.bytes_out is None
    assert any("of an image" in note for note in made.notes)


def test_the_call_that_compiles_is_no_measure_of_a_models_speed():
    backbone = AnalyticBackbone()
    timed = probe.TimedBackbone(backbone, 0.0, compiles=True)
    prompt = backbone.encode_text("hat")
    call = NetworkCall(torch.zeros((1, backbone.latent_channels, 8, 8)), levels(backbone, [401]), [prompt])
    timed.denoise(call)
    assert timed.seconds["denoise"] == []
    timed.denoise(call)
    assert len(timed.seconds["denoise"]) == 1
    with pytest.raises(probe.TimeIsUp):
        timed.denoise(call)


def test_a_models_speed_is_that_of_full_calls_where_there_are_any(monkeypatch):
    """What fills a call up is a copy of its first row, and part of the network computes equal rows once."""
    backbone = AnalyticBackbone()
    timed = probe.TimedBackbone(backbone, 60.0)
    took = iter((1.0, 2.0, 30.0, 40.0))
    monkeypatch.setattr(timed, "_timed", lambda name, call: timed.seconds[name].append(next(took)))
    prompt = backbone.encode_text("hat")

    def asked(distinct):
        latents = torch.arange(float(distinct)).reshape(-1, 1, 1, 1).expand(-1, backbone.latent_channels, 8, 8)
        filled = torch.cat([latents, latents[:1].expand(4 - distinct, -1, -1, -1)])
        return NetworkCall(filled, levels(backbone, [401] * 4), [prompt] * 4)

    assert [probe.filled_share(asked(distinct)) for distinct in (1, 2, 4)] == [0.25, 0.5, 1.0]
    timed.denoise(asked(1))
    timed.denoise(asked(2))
    assert timed.mean("denoise") == 2.0
    timed.denoise(asked(3))
    timed.denoise(asked(4))
    assert timed.mean("denoise") == 40.0


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(SourceError):
        plan(a_recipe(tmp_path), probe=False)


SHARDS, UNITS = 200, 100  # twenty thousand units of one row each, without an image in it


def manifest_of(shard: Shard, chunk: int, recipe: Recipe) -> Manifest:
    """Of a unit that is committed, and in which nothing came out."""
    return Manifest(
        unit=unit_id(shard.path, chunk), generation=1, shard=shard.path, chunk=chunk, start=chunk, stop=chunk + 1,
        is_last=chunk == UNITS - 1, shard_size=shard.size, shard_etag=shard.etag, recipe_hash=recipe.hash,
        code_version="0", model_digest=MODEL.digest, call_size=8, files=(),
        counts=Counts(images=1, asked=0, ok=0, failed=0, failed_by_stage={}, failed_by_class={}),
        measured=Measured(worker_seconds=1.0, workers=1, network_rows=1),
    )  # fmt: skip


def test_twenty_thousand_units_are_planned_and_found_again_within_a_minute_and_in_bounded_memory(place: Place) -> None:
    """Found again: all of finished shards, which were folded but for one, and a part of the last shard's."""
    left = 70
    (place.root / "many").mkdir()
    table = pa.table({"image": [b""] * UNITS, "id": [f"im{number}" for number in range(UNITS)]})
    pq.write_table(table, place.root / "many" / "000.parquet", row_group_size=1)
    for number in range(1, SHARDS):
        shutil.copy(place.root / "many" / "000.parquet", place.root / "many" / f"{number:03d}.parquet")
    place.settle()
    recipe = place.recipe("many", place.new(), unit_size=1)
    out = place.folder(recipe)

    def planned() -> Todo:
        tracemalloc.start()
        started = time.monotonic()
        todo = find_todo(recipe)
        seconds, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 60
        assert peak < 48 << 20  # 14 to 31 MiB were used; every manifest at once takes 64
        return todo

    fresh = planned()
    assert (len(fresh.tasks), fresh.extent.rows, fresh.extent.whole_shards) == (SHARDS * UNITS, SHARDS * UNITS, 0)

    write_run_record(run_record(recipe, fresh.shards, MODEL, 8, 1), recipe.sink)
    (out / "_shards").mkdir()
    *folded, finished, last = fresh.shards
    for shard in folded:
        manifests = [manifest_of(shard, chunk, recipe) for chunk in range(UNITS)]
        (out / shard_path(shard_slug(shard.path), 1)).write_bytes(folded_bytes(manifests))
    for shard, first in ((finished, 0), (last, left)):
        (out / "_units" / shard_slug(shard.path)).mkdir(parents=True)
        for chunk in range(first, UNITS):
            manifest = manifest_of(shard, chunk, recipe)
            (out / manifest_path(manifest.unit, 1)).write_bytes(manifest.to_bytes())
    place.settle()

    again = planned()
    assert [(task.shard.path, task.start, task.stop) for task in again.tasks] == [
        (last.path, chunk, chunk + 1) for chunk in range(left)
    ]
    assert (again.extent.whole_shards, again.extent.shards) == (SHARDS - 1, SHARDS)
    assert sum(map(int.bit_count, again.extent.committed.chunks.values())) == SHARDS * UNITS - left


def test_what_the_host_does_beside_a_device_counts_only_where_it_takes_longer() -> None:
    measured = Probe(
        images=2, call_size=8, seconds_per_call=1.0, seconds_per_image=0.5, host_seconds_per_image=2.0, overlaps=False,
        bytes_per_result=None, device="cpu",
    )  # fmt: skip
    calls, images = 10, 4
    assert seconds_for(8 * calls - 3, images, measured, workers=1) == 10 + 2 + 8
    beside = replace(measured, overlaps=True)
    assert seconds_for(8 * calls, images, beside, workers=2) == (10 + 2) / 2
    assert seconds_for(8 * calls, images, replace(beside, host_seconds_per_image=5.0), workers=2) == 20 / 2
