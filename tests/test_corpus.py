"""Hundreds of broken inputs through the readers and a whole run: each is edited or quarantined with a reason."""

from __future__ import annotations

import resource
import time
from collections import Counter
from typing import Any

import pytest

from pipeline.recipe import recipe_from
from pipeline.running import driver
from tests.corpus import FORMATS, Case, Ends, run_corpus

# Some twenty seconds of two cores, for some six hundred cases: the shards' manifests are synced to disk one by one.
pytestmark = pytest.mark.timeout(280)
MOST_SECONDS = 240.0  # on a machine that does other things as well; a case that hangs is far beyond it
MOST_MEMORY = 700 << 20  # more than before, the corpus (200 MB) and the model's libraries (200 MB) included

Found = dict[str, tuple[list[Case], Ends]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    def run(data: dict[str, Any]) -> None:
        summary = driver.run(recipe_from(data), progress="off")
        assert (summary.complete, summary.exit_code) == (True, 0)

    started, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = run_corpus(tmp_path_factory.mktemp("corpus"), run)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_MEMORY
    assert time.monotonic() - started < MOST_SECONDS
    return ended


def test_there_are_hundreds_of_different_cases(found: Found) -> None:
    names = Counter((format, case.kind, case.name) for format, (cases, _) in found.items() for case in cases)
    assert len(names) > 500
    assert max(names.values()) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_every_case_is_edited_or_quarantined_and_its_sound_neighbours_are_edited(found: Found, format: str) -> None:
    cases, ends = found[format]
    problems = {(case.kind, case.name): wrong for case in cases if (wrong := ends.problems(case))}
    assert problems == {}


@pytest.mark.parametrize("format", FORMATS)
def test_every_result_is_there_once_and_every_failure_says_why(found: Found, format: str) -> None:
    _, ends = found[format]
    assert set(ends.edited.values()) == {1}
    assert not set(ends.edited) & set(ends.rejected)
    for place, (stage, message) in ends.rejected.items():
        assert stage in ("read", "decode", "prepare", "edit"), (place, stage, message)
        assert len(message) > 10, place
        assert "object at 0x" not in message
