"""A row that kills its process ends in quarantine after a bounded number of deaths, and its unit mates are kept."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.running import driver
from pipeline.writing.attempts import ALONE_FROM, Attempt, Note, forget_stops, note_stop, take_over
from tests.places import SETTLE_QUICKLY, Place
from tests.runs import asked, contents, results, write_shards

pytestmark = pytest.mark.timeout(120)
UNMERGED = {"shard_size": 0}

# A run per process, as a person who types the command again, until one survives.
DRIVER = SETTLE_QUICKLY + textwrap.dedent("""
    import json, os, sys
    from pipeline import flow
    from pipeline.running import driver, worker
    from pipeline.recipe import recipe_from
    recipe, poison = recipe_from(json.load(sys.stdin)), set(sys.argv[1:])
    prepare = flow.prepare_row
    def deadly(row, *rest):
        if row.sample.key in poison and not row.refusal:
            os._exit(7)
        return prepare(row, *rest)
    flow.prepare_row = deadly
    for deaths in range(20):
        child = os.fork()
        if child == 0:
            try:
                driver.run(recipe, progress="off")
                os._exit(0)
            except BaseException as error:
                print(error, file=sys.stderr)
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 7:
            print(deaths, code)
            break
""")


def run_until_it_survives(recipe: dict[str, Any], *poison: str) -> list[int]:
    """Deaths, and the exit code of the survivor."""
    command = [sys.executable, "-c", DRIVER, *poison]
    # Not on the command line, which every user of the machine can read: it holds the server's secret.
    done = subprocess.run(command, input=json.dumps(recipe), capture_output=True, text=True, timeout=100, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.fixture(scope="module")
def calm(place: Place) -> Path:
    write_shards(place.root / "in", shards=1, rows=6, damaged=())
    recipe = place.recipe("in", "calm", sink=UNMERGED, unit_size=3)
    driver.run(recipe, progress="off")
    return place.folder(recipe)


def deadly_recipe(place: Place, out: str) -> dict[str, Any]:
    return place.recipe_data("in", out, sink=UNMERGED, engine="local", unit_size=3, max_failed_fraction=0.9)


def test_a_row_that_kills_its_process_is_quarantined_and_its_unit_mates_keep_their_bits(
    place: Place, calm: Path
) -> None:
    out = place.root / place.new()
    assert run_until_it_survives(deadly_recipe(place, out.name), "im01") == [ALONE_FROM, 0]
    assert results(out) == asked(shards=1, rows=6)
    (file,) = (out / "quarantine").iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [(row["key"], row["edit"], row["stage"], row["error_class"], row["attempt"]) for row in rows] == [
        ("im01", edit, "edit", "ProcessKilled", ALONE_FROM) for edit in ("a", "b")
    ]
    assert f"died, {ALONE_FROM} times" in rows[0]["message"]
    unit = file.stem[:-9]  # without the driver's generation
    mates, undisturbed = (
        pq.read_table(path).to_pylist() for folder in (out, calm) for path in (folder / "data").glob(f"{unit}-*")
    )
    assert mates == [row for row in undisturbed if row["key"] != "im01"]
    others = {name: content for name, content in contents(calm).items() if unit[-5:] not in name}
    assert len(others) == 2  # the other unit's data and manifest
    assert others.items() <= contents(out).items()
    assert not list(out.glob("_attempts/*"))


@pytest.mark.parametrize("place", ["local"], indirect=True)  # on S3 the test above tells as much, in fewer deaths
@pytest.mark.usefixtures("calm")
def test_every_row_of_a_unit_may_kill_and_none_is_lost(place: Place) -> None:
    out = place.root / place.new()
    poison = ("im00", "im01", "im02")
    assert run_until_it_survives(deadly_recipe(place, out.name), *poison) == [ALONE_FROM + 2, 0]
    assert results(out) == asked(shards=1, rows=6)
    assert [path.stem[-14:-9] for path in (out / "data").iterdir()] == ["00001"]
    assert [path.stem[-14:-9] for path in (out / "quarantine").iterdir()] == ["00000"]


def test_an_attempt_that_is_left_alive_is_forgotten_and_an_exception_is_no_death(place: Place) -> None:
    sink = place.sink(out := place.new())
    file = place.root / out / "_attempts" / "u-00000-00000001.json"

    def fails(number: int) -> None:
        with Attempt("u-00000", sink, generation=1) as attempt:
            assert attempt.number == number
            assert file.exists()
            attempt.begin_row(5)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fails(1)
    assert not file.exists()
    Attempt("u-00000", sink, generation=1).__enter__()  # its process dies here
    with pytest.raises(ValueError, match="bad"):
        fails(2)
    Attempt("u-00000", sink, generation=1).__enter__().begin_row(5)
    with Attempt("u-00000", sink, generation=1) as attempt:
        assert (attempt.number, attempt.killers) == (3, [5])
    assert not file.exists()


def test_attempts_under_way_when_their_driver_ended_are_no_deaths(place: Place) -> None:
    sink = place.sink(out := place.new())
    Attempt("u-00000", sink, generation=1).__enter__()  # its process dies here, and so with each that follows
    for generation in range(2, 9):
        take_over([Note("u-00000", generation - 1)], sink, generation)
        with_row = Attempt("u-00000", sink, generation).__enter__()
        assert (with_row.number, with_row.killers) == (2, [])
        with_row.begin_row(5)
        note_stop(sink, generation)
    place.settle()
    forget_stops(sink)
    files = sorted(path.name for path in (place.root / out).glob("_attempts/*"))
    assert files[-2:] == ["u-00000-00000007.json", "u-00000-00000008.json"]
    assert [name for name in files if name.endswith(".stopped")] == [f"{at:08d}.stopped" for at in range(2, 9)]
    take_over([Note("u-00000", 7), Note("u-00000", 8)], sink, 9)
    Attempt("u-00000", sink, generation=9).__enter__().begin_row(4)
    take_over([Note("u-00000", 9)], sink, 10)
    with Attempt("u-00000", sink, generation=10) as attempt:
        assert (attempt.number, attempt.killers) == (3, [4])
    for note in (place.root / out).glob("_attempts/*.json"):
        note.unlink()
    place.settle()
    forget_stops(sink)
    assert not list((place.root / out).glob("_attempts/*"))


def test_orphans_of_an_attempt_that_died_are_gone_once_its_unit_is_committed(place: Place, calm: Path) -> None:
    recipe = place.recipe("in", place.new(), sink=UNMERGED, unit_size=3)
    out = place.folder(recipe)
    driver.run(recipe, progress="off")
    for folder in ("quarantine", "_attempts"):
        (out / folder).mkdir(exist_ok=True)
    data = next((out / "data").iterdir())
    manifest = next((out / "_units").glob(f"*/{data.stem[-14:]}.json"))
    manifest.unlink()
    (out / "quarantine" / data.name).write_bytes(b"of a row that has since succeeded")
    (out / "_attempts" / f"{data.stem.removeprefix('part-')}.json").write_text('{"deaths": 1}')
    place.settle()
    driver.run(recipe, progress="off")
    assert contents(out) == contents(calm)
    assert results(out) == asked(shards=1, rows=6)
    assert not list(out.glob("_attempts/*"))
