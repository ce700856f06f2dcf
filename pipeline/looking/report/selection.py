"""Which results a report shows, in which order, on which page.

Whole images are chosen, sorted and counted: all edits of one, by all methods, stand in one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.evaluation.verdict import Verdict
from pipeline.looking.results import ResultRef

T = TypeVar("T")
ResultKey = tuple[str, int]
"""A result by its file and its row in that file."""
Verdicts = Mapping[ResultKey, Verdict]
Gains = Mapping[ResultKey, float]
"""Text gains, in points (text_gain.py)."""


def key_of(ref: ResultRef) -> ResultKey:
    """What tells a result from all others of its run."""
    return ref.file, ref.row_in_file


@dataclass(slots=True)
class ImageRow:
    """One image: its results and what failed of it."""

    id: str
    refs: list[ResultRef] = field(default_factory=list)
    failures: list[Mapping[str, str]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Results that were asked for."""
        return len(self.refs) + len(self.failures)


def images_of(refs: Iterable[ResultRef], failures: Iterable[Mapping[str, str]]) -> list[ImageRow]:
    """Results and failures by image, in the order in which images come."""
    rows: dict[str, ImageRow] = {}
    for ref in refs:
        rows.setdefault(ref.id, ImageRow(ref.id)).refs.append(ref)
    for failure in failures:
        rows.setdefault(failure["id"], ImageRow(failure["id"])).failures.append(failure)
    return list(rows.values())


def worst_first(rows: Iterable[ImageRow], verdicts: Verdicts) -> list[ImageRow]:
    """Sorted by each image's worst score, then by its mean; images without any score come last. As page.js does."""

    def place(row: ImageRow) -> tuple[bool, float, float, str]:
        scores = [score for ref in row.refs if (score := verdicts[key_of(ref)].score) is not None]
        return not scores, min(scores, default=0.0), sum(scores) / (len(scores) or 1), row.id

    return sorted(rows, key=place)


def choose(rows: Sequence[ImageRow], verdicts: Verdicts, limit: int) -> list[ImageRow]:
    """Images with about `limit` results together: of every method and edit the worst, and as many spread over the rest.

    Whole images are taken, so that a row is never cut; at least one. Images that failed altogether fill what is left.
    """
    if sum(row.size for row in rows) <= limit:
        return list(rows)
    by_id = {row.id: row for row in rows}
    refs = [ref for row in rows for ref in row.refs]
    wanted = dict.fromkeys([ref.id for ref in by_turns(refs, verdicts)] + list(by_id))
    chosen: set[str] = set()
    size = 0
    for name in wanted:
        if chosen and size + by_id[name].size > limit:
            break
        chosen.add(name)
        size += by_id[name].size
    return [row for row in rows if row.id in chosen]


def by_turns(refs: Iterable[ResultRef], verdicts: Verdicts) -> Iterator[ResultRef]:
    """Results in such an order that any beginning holds every method and edit: the worst of each, others between."""
    groups: dict[tuple[str, str], list[ResultRef]] = {}
    for ref in refs:
        groups.setdefault((ref.method, ref.edit), []).append(ref)
    queues = []
    for _, members in sorted(groups.items()):
        members.sort(key=lambda ref: (_score_or_more(verdicts[key_of(ref)]), ref.id))
        queues.append((members, _by_halves(len(members))))
    longest = max((len(members) for members, _ in queues), default=0)
    for turn in range(longest):
        for members, middles in queues:
            if turn < len(members):
                yield members[turn]
                yield members[next(middles)]


def _score_or_more(verdict: Verdict) -> float:
    return 101.0 if verdict.score is None else verdict.score


def _by_halves(length: int) -> Iterator[int]:
    """The middle of 0..length - 1, then the middles of both halves, and so on: any beginning is spread evenly."""
    ranges = [(0, length)]
    while ranges:
        narrower = []
        for start, stop in ranges:
            if start < stop:
                middle = (start + stop) // 2
                yield middle
                narrower += [(start, middle), (middle + 1, stop)]
        ranges = narrower


def pages_of(rows: Sequence[ImageRow], size: int) -> list[list[ImageRow]]:
    """Rows in pages of at most `size` results, or of one image that has more; at least one page."""
    pages: list[list[ImageRow]] = [[]]
    filled = 0
    for row in rows:
        if pages[-1] and filled + row.size > size:
            pages.append([])
            filled = 0
        pages[-1].append(row)
        filled += row.size
    return pages


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` items, evenly over all of them."""
    if len(items) <= limit:
        return list(items)
    return [items[at * len(items) // limit] for at in range(limit)]
