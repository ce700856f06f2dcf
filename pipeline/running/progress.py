"""Shows how far a run is: a bar on a terminal, elsewhere one line every 30 seconds. Either fits into 80 columns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text
from typing_extensions import override

from pipeline.running.tally import Seen

Display = Literal["auto", "bar", "lines", "off"]
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 1.0
LINE_WIDTH = 79  # columns; the last one of a terminal wraps on some
BAR_WIDTH = 10


class Watch:
    """Shows progress from a thread of its own, as a context manager. A bar shows the last state as well.

    Args:
        read: how far the run is.
        display: a bar, lines, or neither; auto: what fits where standard error goes.
        console: where to; standard error if none is given.
    """

    def __init__(self, read: Callable[[], Seen], *, display: Display, console: Console | None = None) -> None:
        self._read = read
        self._console = console or Console(stderr=True)
        self._display = _resolved(display, self._console)
        self._started = time.monotonic()
        self._first: tuple[float, int] | None = None  # when images were first seen, and how many: loading comes before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._bar if self._display == "bar" else self._lines, daemon=True)

    def __enter__(self) -> Watch:
        if self._display != "off":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._display != "off":
            self._thread.join()

    def line(self, seen: Seen, width: int = LINE_WIDTH) -> str:
        """The state of the run in one line of at most so many columns: what matters least is left out first."""
        now = time.monotonic()
        rate = self._rate(seen, now)
        done, left = seen.images_before + seen.images, seen.images_left
        images = f"{done:,} images"
        if left is not None:
            images = f"{done:,} of {'about ' if seen.estimated and left else ''}{round(done + left):,} images"
        parts = [images, f"{seen.shards:,} of {seen.of_shards:,} shard{'s' * (seen.of_shards != 1)}"]
        if seen.failed:
            parts.append(f"{seen.failed:,} failed")
        parts.append(f"{rate:.2g}/s" if rate < 100 else f"{rate:,.0f}/s")
        parts.append(
            f"{clock(left / rate)} left" if left is not None and rate else f"{clock(now - self._started)} so far"
        )
        for spare in ("/s", ("shard", "shards"), "failed"):
            if len(", ".join(parts)) > width:
                parts = [part for part in parts if not part.endswith(spare)]
        return ", ".join(parts)[:width]

    def _rate(self, seen: Seen, now: float) -> float:
        """Images per second, from the first that was seen on where there are more."""
        if seen.images and self._first is None:
            self._first = (now, seen.images)
        since, before = self._first or (self._started, 0)
        if seen.images == before or now - since < SECONDS_BETWEEN_LOOKS:
            since, before = self._started, 0
        return (seen.images - before) / max(now - since, 1e-9)

    def _lines(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LINES):
            # Not through the console, whose width does not apply to a log.
            print(self.line(self._read()), file=self._console.file, flush=True)

    def _bar(self) -> None:
        columns = (BarColumn(bar_width=BAR_WIDTH), _Line())
        with Progress(*columns, console=self._console) as bars:
            bar = bars.add_task("", total=None)
            over = False
            while not over:
                over = self._stop.wait(SECONDS_BETWEEN_LOOKS)
                seen = self._read()
                done = seen.images_before + seen.images
                total = None if seen.images_left is None else done + seen.images_left
                text = self.line(seen, min(LINE_WIDTH, self._console.width - 1) - BAR_WIDTH - 1)
                bars.update(bar, description=text, total=total, completed=done)


class _Line(ProgressColumn):
    """A task's description, never wrapped."""

    @override
    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def clock(seconds: float) -> str:
    """ "1:02:03"; days where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def _resolved(display: Display, console: Console) -> Display:
    if display != "auto":
        return display
    return "bar" if console.is_terminal else "lines"
