"""Units become files of their own size: in one order, whatever was killed, and what was done again takes its place."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RunAborted, SinkError
from pipeline.reading.storage import open_fs
from pipeline.recipe import Recipe
from pipeline.writing import indexing, merging
from pipeline.writing.commit import commit, committed_units
from pipeline.writing.finish import finish_unit
from pipeline.writing.merged import Merged, Span
from pipeline.writing.merging import merge_here, merge_units
from pipeline.writing.rows import encode_outcome
from pipeline.writing.spans import samples_of, table_of
from tests.writing.making import MODEL, NOW, claim, make_edited, make_rejected, make_unit, unclaimed

UNITS = 5
SIZES = {"parquet": 65_000, "webdataset": 55_000}  # bytes: room for two units, not for three
Result = tuple[int, str]  # index of a row, and where it is

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(params=["local", "memory"])
def make(request: pytest.FixtureRequest, recipe_for: MakeRecipe, tmp_path: Path) -> Iterator[MakeRecipe]:
    """Recipes whose sinks are local folders, or prefixes in an object store of whole puts."""
    where = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"

    def build(name: str, *, format: str = "parquet", **sink: Any) -> Recipe:
        return recipe_for(folder=f"{where}/{name}", format=format, **{"shard_size": SIZES[format], **sink})

    yield build
    if request.param == "memory" and fsspec.filesystem("memory").exists(f"/{tmp_path.name}"):
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def do_unit(recipe: Recipe, chunk: int, *, failing: bool = False, generation: int = 1) -> None:
    """A unit of two images, the second of which fails in odd units; with `failing`, so does the first of all."""
    at = 2 * chunk
    outcomes = [
        make_rejected(at) if failing else make_edited(at),
        make_rejected(at + 1) if chunk % 2 else make_edited(at + 1),
    ]
    rows = [encode_outcome(outcome, recipe, MODEL, 8) for outcome in outcomes]
    unit = make_unit(at, at + 1, chunk=chunk, is_last=chunk == UNITS - 1)
    commit(finish_unit(unit, rows, recipe, **NOW | {"generation": generation}), recipe.sink, unclaimed)


def do_all(recipe: Recipe, *, failing: int | None = None) -> Recipe:
    for chunk in range(UNITS):
        do_unit(recipe, chunk, failing=chunk == failing)
    return recipe


def merge(recipe: Recipe, generation: int = 1) -> bool:
    return merge_units(recipe.sink, merge_here, claim(recipe, generation))


def files(recipe: Recipe) -> dict[str, bytes]:
    """Every file of data, quarantine and what says what they hold."""
    fs, root = open_fs(recipe.sink.folder, {})
    found = {path[len(root) + 1 :]: path for path in fs.find(root)}
    return {name: fs.cat_file(path) for name, path in found.items() if not name.startswith(("_units", "_lock"))}


def names(recipe: Recipe, start: str = "") -> list[str]:
    """Without the digits of what they hold."""
    return sorted(re.sub(r"-[0-9a-f]{8}(?=\.)", "", name) for name in files(recipe) if name.startswith(start))


def rows_of(recipe: Recipe, span: Span) -> list[int]:
    fs, root = open_fs(recipe.sink.folder, {})
    if span.path.endswith(".tar"):
        return [json.loads(sample["json"])["index"] for sample in samples_of(fs, root, span)]
    return [row["index"] for row in table_of(fs, root, span, ["index"]).to_pylist()]


def as_readers_see_it(recipe: Recipe) -> Counter[Result]:
    """Every result of every committed unit, by the manifests and the index."""
    fs, root = open_fs(recipe.sink.folder, {})
    merged = Merged(fs, root)
    spans = [span for manifest in committed_units(recipe.sink) for span in merged.spans(manifest)]
    return Counter((index, span.kind) for span in spans for index in rows_of(recipe, span))


def as_globs_see_it(recipe: Recipe) -> Counter[Result]:
    """Every result of what stands in data/ and quarantine/."""
    found: Counter[Result] = Counter()
    for name, data in files(recipe).items():
        kind = name.partition("/")[0]
        if kind.startswith("_"):
            continue
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        found[json.loads(tar.extractfile(member).read())["index"], kind] += 1  # type: ignore[union-attr]
        else:
            found.update((row["index"], kind) for row in pq.read_table(io.BytesIO(data), columns=["index"]).to_pylist())
    return found


def wanted(*, failing: int | None = None) -> Counter[Result]:
    failed = {2 * chunk + 1 for chunk in range(1, UNITS, 2)} | ({2 * failing} if failing is not None else set())
    return Counter((index, "quarantine" if index in failed else "data") for index in range(2 * UNITS))


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_units_stand_in_files_of_the_asked_size_in_their_order(make: MakeRecipe, format: str) -> None:
    recipe = do_all(make("out", format=format))
    assert merge(recipe)
    suffix = {"parquet": "parquet", "webdataset": "tar"}[format]
    assert names(recipe, "data") == [f"data/train-{at:05d}-of-00003.{suffix}" for at in range(3)]
    assert names(recipe, "quarantine") == [f"quarantine/train-00000-of-00001.{suffix}"]
    assert not names(recipe, "_parts"), "units' own files are removed"
    assert as_readers_see_it(recipe) == as_globs_see_it(recipe) == wanted()
    fs, root = open_fs(recipe.sink.folder, {})
    merged = Merged(fs, root)
    spans = [span for manifest in committed_units(recipe.sink) for span in merged.spans(manifest)]
    of_data = [span for span in spans if span.kind == "data"]
    assert [index for span in of_data for index in rows_of(recipe, span)] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert not merge(recipe), "nothing is left to do"


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_the_bytes_do_not_depend_on_the_order_in_which_units_were_committed(make: MakeRecipe, format: str) -> None:
    forward, backward = make("forward", format=format), make("backward", format=format)
    for chunk in range(UNITS):
        do_unit(forward, chunk)
        do_unit(backward, UNITS - 1 - chunk)
    merge(forward)
    merge(backward)
    assert files(forward) == files(backward)


def test_rows_of_small_units_share_row_groups_and_keep_schema_and_bytes(make: MakeRecipe) -> None:
    apart, together = do_all(make("apart", shard_size=0)), do_all(make("together", shard_size=10**9))
    merge(together)
    tables = [pq.read_table(io.BytesIO(data)) for name, data in files(apart).items() if name.startswith("data/")]
    (data,) = (data for name, data in files(together).items() if name.startswith("data/train-00000-of-00001-"))
    merged = pq.ParquetFile(io.BytesIO(data))
    assert merged.num_row_groups == 1
    assert merged.schema_arrow.equals(tables[0].schema, check_metadata=True)
    assert merged.read().drop_columns("recipe_hash").to_pylist() == [
        row for table in tables for row in table.drop_columns("recipe_hash").to_pylist()
    ]


class KilledError(Exception):
    """Stands for SIGKILL: nothing that the code does about it would have happened."""


def killed_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many operations on the store through, and no more; of a file that is written piece by piece, half."""
    left = [steps]

    def counted(function: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return function(*args, **options)

        return step

    for module, name in ((merging, "put"), (merging, "put_made"), (indexing, "put"), (indexing, "remove")):
        patch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_a_kill_at_any_operation_loses_and_doubles_nothing_and_the_rerun_ends_in_the_same_bytes(
    make: MakeRecipe, format: str
) -> None:
    calm = do_all(make("calm", format=format))
    merge(calm)
    undisturbed = files(calm)
    recipe = make("out", format=format)
    steps = 0
    while True:
        fs, root = open_fs(recipe.sink.folder, {})
        if fs.exists(root):
            fs.rm(root, recursive=True)
        do_all(recipe)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(steps, patch)
            try:
                merge(recipe)
                break
            except KilledError:
                pass
        assert as_readers_see_it(recipe) == wanted(), f"after {steps} operations"
        merge(recipe)
        assert files(recipe) == undisturbed, f"after {steps} operations"
        assert as_globs_see_it(recipe) == wanted()
        steps += 1
    # Files and their contents, the index, the units' own files.
    assert steps == 2 * 4 + 1 + (5 + 2)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_what_is_done_again_is_written_anew_with_its_file_alone_and_a_kill_leaves_one_or_the_other(
    make: MakeRecipe, format: str
) -> None:
    recipe = make("out", format=format)
    fs, root = open_fs(recipe.sink.folder, {})
    steps = 0
    while True:
        if fs.exists(root):
            fs.rm(root, recursive=True)
        do_all(recipe, failing=2)
        merge(recipe)
        before = files(recipe)
        assert as_readers_see_it(recipe) == wanted(failing=2)
        do_unit(recipe, 2, generation=2)
        assert as_readers_see_it(recipe) == wanted(), "the new commit counts before it is merged"
        with pytest.MonkeyPatch.context() as patch:
            killed_after(steps, patch)
            try:
                merge(recipe, 2)
                break
            except KilledError:
                pass
        assert as_readers_see_it(recipe) == wanted(), f"after {steps} operations"
        merge(recipe, 3)
        assert as_globs_see_it(recipe) == wanted(), f"after {steps} operations"
        steps += 1
    assert steps > 6
    after = files(recipe)
    assert as_globs_see_it(recipe) == as_readers_see_it(recipe) == wanted()
    kept = {name for name in before if name.startswith("data/") and after.get(name) == before[name]}
    assert len(kept) == 2, "the other files are left alone"
    (new,) = {name for name in after if name.startswith("data/")} - kept
    assert re.fullmatch(r"data/train-0000\d-of-00003-[0-9a-f]{8}\.(parquet|tar)", new)
    assert not merge(recipe, 2)


def test_a_kind_that_is_left_without_rows_in_one_of_its_files_is_cut_anew(make: MakeRecipe) -> None:
    recipe = do_all(make("out", shard_size=10**9), failing=4)
    for chunk in (0, 2):
        do_unit(recipe, chunk)
    merge(recipe)
    fs, root = open_fs(recipe.sink.folder, {})
    assert len(Merged(fs, root).slots("quarantine")) == 1

    for chunk in (1, 3, 4):
        at = 2 * chunk
        rows = [encode_outcome(make_edited(index), recipe, MODEL, 8) for index in (at, at + 1)]
        unit = make_unit(at, at + 1, chunk=chunk, is_last=chunk == UNITS - 1)
        commit(finish_unit(unit, rows, recipe, **NOW | {"generation": 2}), recipe.sink, unclaimed)
    merge(recipe, 2)
    assert names(recipe, "quarantine") == []
    assert as_globs_see_it(recipe) == Counter((index, "data") for index in range(2 * UNITS))


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_the_units_of_a_file_that_is_not_as_indexed_are_done_again_and_end_in_the_same_bytes(
    make: MakeRecipe, damage: str
) -> None:
    recipe = do_all(make("out"))
    merge(recipe)
    before = files(recipe)
    fs, root = open_fs(recipe.sink.folder, {})
    (lost,) = (f"{root}/{name}" for name in before if name.startswith("data/train-00001-of-00003-"))
    if damage == "gone":
        fs.rm_file(lost)
    else:
        fs.pipe_file(lost, fs.cat_file(lost)[:-1])
    assert [manifest.chunk for manifest in committed_units(recipe.sink)] == [0, 1, 4]
    for chunk in (2, 3):
        do_unit(recipe, chunk, generation=2)
    merge(recipe, 2)
    after = files(recipe)
    for index in (one.pop(f"_output/index-0000000{at}.json") for at, one in ((1, before), (2, after))):
        assert json.loads(index)["dying"] == []
    assert after == before


def test_a_unit_whose_bytes_have_changed_is_not_taken_into_a_file(make: MakeRecipe) -> None:
    recipe = do_all(make("out"))
    fs, root = open_fs(recipe.sink.folder, {})
    path = f"{root}/{next(committed_units(recipe.sink)).files[0].path}"
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 1
    fs.pipe_file(path, bytes(data))
    with pytest.raises(SinkError, match=r"00000-00000001\.parquet has other bytes than were committed"):
        merge(recipe)


def test_a_driver_that_has_lost_the_folder_removes_nothing(make: MakeRecipe) -> None:
    recipe = do_all(make("out"))
    lost = claim(recipe, 1)
    claim(recipe, 2)
    with pytest.raises(RunAborted, match="was taken over"):
        merge_units(recipe.sink, merge_here, lost)
    assert len(names(recipe, "_parts/data")) == UNITS
    assert as_readers_see_it(recipe) == wanted()


def test_a_file_that_a_driver_may_still_be_removing_is_written_under_another_name(make: MakeRecipe) -> None:
    recipe = do_all(make("out"), failing=2)
    merge(recipe)
    old = {name for name in files(recipe) if name.startswith("data/")}
    do_unit(recipe, 2, generation=2)

    def stopped(fs: Any, path: str) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "remove", stopped)
        with pytest.raises(KilledError):
            merge(recipe, 2)
    # Meanwhile another driver: what it makes of the unit is what the first one made.
    do_unit(recipe, 2, failing=True, generation=3)
    merge(recipe, 3)
    fs, root = open_fs(recipe.sink.folder, {})
    going = set(dying(recipe))
    assert len(going & old) == 1
    for name in going:  # the second one wakes up
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{name}")
    assert as_readers_see_it(recipe) == as_globs_see_it(recipe) == wanted(failing=2)


def dying(recipe: Recipe) -> tuple[str, ...]:
    """What a later index keeps in mind of an earlier driver's removals."""
    fs, root = open_fs(recipe.sink.folder, {})
    index = Merged(fs, root).index
    assert index is not None
    return index.dying
