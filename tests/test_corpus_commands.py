"""Recipes, places, checkpoints and run folders that nobody meant, through the commands: no fault of theirs is ours."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.corpus.commands import Situation, World
from tests.corpus.situations import all_situations

pytestmark = pytest.mark.timeout(280)
SITUATIONS = list(all_situations())
MOST_MEMORY = 600 << 20  # more than before
# `python -m tests.corpus` gives every situation all of its commands. Here each has one, by turns, and of checkpoints,
# whose own tests are in tests/models, a few are tried.
EVERY = {"checkpoint": 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("commands"))


def sampled(kind: str) -> Iterator[Situation]:
    found = [one for one in SITUATIONS if one.kind == kind]
    for number, one in enumerate(found):
        if number % EVERY.get(kind.partition(" ")[0], 1) == 0:
            yield one.with_commands(one.commands[number % len(one.commands)])


def test_there_are_hundreds_of_different_situations() -> None:
    names = Counter((one.kind, one.name) for one in SITUATIONS)
    assert len(names) > 500
    assert max(names.values()) == 1


@pytest.mark.parametrize("kind", dict.fromkeys(one.kind for one in SITUATIONS))
def test_what_is_wrong_is_told_by_name_in_time_and_never_as_a_fault_of_ours(world: World, kind: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = {one.name: found for one in sampled(kind) if (found := world.meet(one).problems())}
    assert problems == {}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_MEMORY
