"""A run that is killed, changed or cut otherwise, on local files and on S3, in one process.

The drivers that are killed are children of one process, which has imported everything once.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from pipeline.errors import SinkError
from pipeline.looking.verify import verify
from pipeline.recipe import Recipe
from pipeline.running import driver
from pipeline.writing.run_record import read_run_record
from tests.places import SETTLE_QUICKLY, Place
from tests.runs import asked, contents, results, write_shards

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def calm(place: Place) -> dict[str, Any]:
    write_shards(place.root / "in", shards=3, rows=5)
    recipe = place.recipe("in", "calm")
    driver.run(recipe, progress="off")
    return contents(place.folder(recipe))


# For each (commits, pause) a driver of its own is killed so many seconds after so many units are committed.
KILLER = SETTLE_QUICKLY + textwrap.dedent("""
    import json, os, signal, sys, time
    from pathlib import Path
    from pipeline.running import driver
    from pipeline.running import in_process
    from pipeline.recipe import recipe_from

    asked = json.load(sys.stdin)
    recipe, units = recipe_from(asked["recipe"]), Path(asked["units"])
    commit = in_process.commit

    def slow(*args):
        time.sleep(0.15)  # so that a kill between two commits is likely
        return commit(*args)

    def committed():
        return len(list(units.glob("*/*.json")))

    in_process.commit = slow
    for wanted, pause in asked["kills"]:
        child = os.fork()
        if child == 0:
            try:
                driver.run(recipe, progress="off")
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
            os._exit(0)
        while committed() < wanted:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            time.sleep(0.02)
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), wanted, committed())
""")


def test_a_run_that_is_killed_three_times_ends_with_the_bytes_of_an_undisturbed_one(
    place: Place, calm: dict[str, Any]
) -> None:
    dice = random.Random(0)
    recipe = place.recipe("in", place.new())
    out = place.folder(recipe)
    orders = {
        "recipe": place.recipe_data("in", out.name, engine="local"),
        "units": str(out / "_units"),
        "kills": [(wanted, dice.uniform(0, 0.3)) for wanted in sorted(dice.sample(range(1, 8), 3))],
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        input=json.dumps(orders),  # not on the command line, which every user can read: it holds the server's secret
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert [code for code, _, _ in kills] == [-9, -9, -9]
    assert all(wanted <= committed < 9 for _, wanted, committed in kills), kills
    assert driver.run(recipe, progress="off").complete
    assert contents(out) == calm
    assert results(out) == asked(shards=3, rows=5)


def changed_prompt(recipe: dict[str, Any]) -> None:
    recipe["edits"]["a"]["concepts"][0]["prompt"] = "crown"


def changed_unit_size(recipe: dict[str, Any]) -> None:
    recipe["run"]["unit_size"] = 3


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (changed_prompt, r'edits\.a\.concepts: was \[.*"concept a".*, is \[.*"crown"'),
        (changed_unit_size, r"run\.unit_size: was 2, is 3"),
    ],
)
def test_a_changed_recipe_is_refused_with_a_diff_before_a_model_is_loaded(
    place: Place, calm: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: Any, difference: str
) -> None:
    monkeypatch.setattr("pipeline.models.loading.load_backbone", lambda *_, **__: pytest.fail("a model was loaded"))
    data = place.recipe_data("in", "calm", engine="local")
    change(data)
    with pytest.raises(SinkError, match=difference):
        driver.run(Recipe.model_validate(data), progress="off")
    assert contents(place.root / "calm") == calm
    assert results(place.root / "calm") == asked(shards=3, rows=5)


def test_a_changed_input_is_refused_by_name_though_its_size_is_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = place.new("in"), place.new()
    write_shards(place.root / source, shards=3, rows=2, damaged=())
    driver.run(place.recipe(source, recipe), progress="off")
    before = contents(place.root / recipe)
    monkeypatch.setattr("pipeline.models.loading.load_backbone", lambda *_, **__: pytest.fail("a model was loaded"))
    first, second, third = sorted((place.root / source).iterdir())
    first.write_bytes(first.read_bytes().replace(b"a caption", b"A caption"))
    third.rename(second.with_name("s9.tar"))
    place.settle()
    with pytest.raises(SinkError) as caught:
        driver.run(place.recipe(source, recipe), progress="off")
    for line in ("s2.tar is gone", "s9.tar is new", "s0.tar has changed (of the same size)"):
        assert line in str(caught.value)
    assert "s1.tar" not in str(caught.value)
    assert contents(place.root / recipe) == before


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.usefixtures("calm")
def test_the_number_of_units_in_flight_and_the_order_of_shards_change_no_byte(
    place: Place, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = driver.find_todo

    def backwards(recipe: Recipe, **options: Any) -> Any:
        todo = plan(recipe, **options)
        todo.tasks.reverse()
        return todo

    def wrote(**run: Any) -> dict[str, Any]:
        recipe = place.recipe("in", place.new(), sink={"format": format, "include_input": True}, **run)
        driver.run(recipe, progress="off")
        record = read_run_record(recipe.sink)
        assert record is not None
        found = verify(recipe.sink, record)  # every row of what was asked for, in either format
        assert (found.clean, found.units, found.done, found.failed) == (True, 9, 28, 2)
        return contents(place.folder(recipe))

    one = wrote()
    monkeypatch.setattr(driver, "find_todo", backwards)
    assert wrote(images_in_flight=1) == one
