"""A sample of the damaged inputs of `tests/corpus.py` as objects on S3: of each comes what comes of it as a file.

Links, pipes and names that are no text have no part in it: there are no such objects.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.corpus import (
    FORMATS,
    PNG,
    Case,
    Ends,
    Member,
    archive_cases,
    folder_files,
    picture_cases,
    recipe_of,
    row_case,
    table_cases,
    tar,
    text_cases,
)
from tests.places import Place, only_on_s3
from tests.runs import rows_on_any_store

# The same inputs stand on files in the fast suite.
pytestmark = [only_on_s3, pytest.mark.timeout(280), pytest.mark.slow]


def write_sample(root: Path) -> dict[str, list[Case]]:
    """The first case of every kind of damaged archive and table, and every fifth of the damaged rows."""
    cases: dict[str, list[Case]] = {format: [] for format in FORMATS}
    for format, made in (("webdataset", archive_cases()), ("parquet", table_cases())):
        (root / format).mkdir(parents=True)
        kinds = set()
        for case, data in made:
            if case.kind not in kinds:
                kinds.add(case.kind)
                (root / format / case.shard).write_bytes(data)
                cases[format].append(case)
    members: list[Member] = []
    for number, (kind, name, ext, data, outcome) in enumerate(islice(picture_cases(), 0, None, 5)):
        members.append((f"p{number:03d}.{ext}", data))
        cases["webdataset"].append(row_case(kind, name, "rows.tar", f"p{number:03d}", outcome))
    for number, (kind, name, beside, outcome) in enumerate(islice(text_cases(), 0, None, 5)):
        members += [(f"t{number:03d}.{ext}", data) for ext, data in {"png": PNG, **beside}.items()]
        cases["webdataset"].append(row_case(kind, name, "rows.tar", f"t{number:03d}", outcome))
    (root / "webdataset" / "rows.tar").write_bytes(tar(members))
    (root / "folder").mkdir()
    (root / "folder" / "sound.png").write_bytes(PNG)
    cases["folder"].append(row_case("file", "sound", ".", "sound", "edited"))
    for kind, name, path, data, outcome in folder_files():
        if kind == "file":
            (root / "folder" / path).write_bytes(data)
            cases["folder"].append(row_case(kind, name, ".", path.rpartition(".")[0], outcome))
    return cases


@dataclass(frozen=True)
class Found:
    source: Path
    cases: list[Case]
    on_s3: Path  # what the run wrote
    on_disk: Path


@pytest.fixture(scope="module")
def found(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    def run(data: dict[str, Any]) -> None:
        summary = driver.run(recipe_from(data), progress="off")
        assert (summary.complete, summary.exit_code) == (True, 0)

    cases, on_disk = write_sample(place.root / "in"), tmp_path_factory.mktemp("disk")
    place.settle()
    for format in FORMATS:
        run(recipe_of(place.root / "in" / format, on_disk / format, format))
        data = recipe_of(Path("in", format), Path("out", format), format)
        data["source"] |= {"shards": f"{place.url}/in/{format}", "storage_options": place.storage_options}
        data["sink"] = {"folder": f"{place.url}/out/{format}", "storage_options": place.storage_options}
        run(data)
    return {
        format: Found(place.root / "in" / format, cases[format], place.root / "out" / format, on_disk / format)
        for format in FORMATS
    }


@pytest.mark.parametrize("format", FORMATS)
def test_every_damaged_input_ends_on_s3_as_it_does_on_files_row_for_row(found: dict[str, Found], format: str) -> None:
    one = found[format]
    assert len({case.kind for case in one.cases}) >= {"webdataset": 25, "parquet": 10, "folder": 1}[format]
    ends = Ends.of(one.on_s3)
    assert {(case.kind, case.name): wrong for case in one.cases if (wrong := ends.problems(case))} == {}
    assert set(ends.edited.values()) == {1}
    assert not set(ends.edited) & set(ends.rejected)
    assert rows_on_any_store(one.on_s3) == rows_on_any_store(one.on_disk)


def keys_of_headers(data: bytes) -> set[str]:
    """Keys of the corpus' samples one of whose headers is whole, wherever it stands; knows nothing of our reader."""
    keys = set()
    for at in range(0, len(data) - 511, 512):
        try:
            member = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            continue
        if member.isreg() and re.fullmatch(r"([a-e]|[pt]\d{3})\.[a-z0-9]+", member.name):
            keys.add(member.name.partition(".")[0])
    return keys


def test_every_sample_that_has_a_header_is_edited_or_quarantined_and_their_sum_is_that_of_the_headers(
    found: dict[str, Found],
) -> None:
    one = found["webdataset"]
    ends = Ends.of(one.on_s3)
    accounted: dict[str, Counter[str]] = {}
    for shard, key in (*ends.edited.elements(), *ends.rejected):
        accounted.setdefault(shard, Counter())[key] += 1
    checked = 0
    for path in sorted(one.source.glob("*.tar")):
        keys = keys_of_headers(path.read_bytes())
        assert {key: accounted[path.name][key] for key in keys} == dict.fromkeys(keys, 1), path.name
        checked += len(keys)
    assert checked > 100
    # Here only contents are damaged, so that headers are all there is to count.
    rows_of_shard = [case.row for case in one.cases if case.row]
    assert accounted["rows.tar"] == Counter(rows_of_shard)
    assert accounted["rows.tar"].total() == len(keys_of_headers((one.source / "rows.tar").read_bytes()))
