"""docs/flow.md names the files through which a row goes, from its shard to its manifest. Does it go that way?"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.reading.listing import list_source
from pipeline.reading.units import plan_reads, read_units
from pipeline.recipe import recipe_from
from pipeline.running.pool import WorkerSettings
from pipeline.running.worker import Worker
from pipeline.writing.commit import commit
from tests.runs import recipe_data, write_shards

ROOT = Path(__file__).parents[1]
STEP = re.compile(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", re.MULTILINE)
MOST = 12  # files


def test_a_row_goes_the_way_that_the_page_shows_and_takes_each_step_once(tmp_path: Path) -> None:
    steps = STEP.findall((ROOT / "docs" / "flow.md").read_text())
    assert 8 <= len({file for file, _ in steps}) == len(steps) <= MOST
    write_shards(tmp_path / "in", shards=1, rows=1, damaged=())
    recipe = recipe_from(recipe_data(tmp_path / "in", tmp_path / "out"))
    recipe = recipe.model_copy(update={"edits": dict([next(iter(recipe.edits.items()))])})
    worker = Worker(recipe, WorkerSettings(call_size=4, threads=1))
    entered: dict[FrameType, tuple[str, str]] = {}  # a generator's frame is entered again and again

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT / "pipeline"):
            step = (path.relative_to(ROOT / "pipeline").as_posix(), frame.f_code.co_name)
            if step in steps:
                entered.setdefault(frame, step)

    tasks = plan_reads(list_source(recipe.source).shards, 1, lambda _: False, lambda _: False)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        for unit_input in read_units(tasks[0], recipe.source, 1, lambda _: False):
            commit(worker.finish(unit_input, generation=1), recipe.sink, lambda: None)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        worker.close()
    assert list(entered.values()) == steps
