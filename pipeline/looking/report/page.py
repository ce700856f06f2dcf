"""report.html: a run at a glance, in pages that open from disk, from a download and on a phone.

The first page shows the run's numbers, what failed and why, methods and edits compared, and the results themselves; a
run of more than `PAGE_RESULTS` goes on in report/page-0002.html and so on. A page holds its pictures, styles and
script, and needs no network.

Cost: without being asked for more, figures of at most `MAX_UNITS` units and pictures of about `MAX_RESULTS` results are
read, however long the run was. `results=None` shows every result of any run: as many pages as that takes.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.common.wording import count
from pipeline.evaluation import verdict
from pipeline.evaluation.metrics import MAX_PSNR
from pipeline.evaluation.verdict import judge
from pipeline.looking.report import gates, overview
from pipeline.looking.report.cards import Pictures, image_card, pictures_of
from pipeline.looking.report.selection import (
    Gains,
    ImageRow,
    ResultKey,
    Verdicts,
    choose,
    images_of,
    key_of,
    pages_of,
    spread,
    worst_first,
)
from pipeline.looking.report.templates import page_template
from pipeline.looking.report.text_gain import text_gain
from pipeline.looking.results import READERS, ResultRef, RunFolder
from pipeline.recipe import SinkConfig
from pipeline.writing.files import list_folder, put_over_ours, remove
from pipeline.writing.manifest import KINDS
from pipeline.writing.paths import refuse_links

if TYPE_CHECKING:
    from pipeline.models.image_text import ImageTextModel

PAGE_RESULTS = 500  # of one page: 10 MB where each is the one edit of a photograph, less where edits share an input
MAX_RESULTS = 1000  # with pictures, unless more is asked for
MAX_UNITS = 256  # whose results, and whose failures, are read unless all is asked for; spread over longer runs
MAX_SORTED = 10_000  # results; longer reports follow the data: sorted, every page would open every file
INDEX_PATH = "report/index.js"
MARKS = {".html": b"shardedit report</title>", ".js": b"shardeditIndex = "}  # of files of ours
MAX_INDEXED = 20_000  # results that can be searched from every page: the index takes about 200 bytes for each


def write_report(
    sink: SinkConfig | str, *, results: int | None = MAX_RESULTS, score_model: ImageTextModel | None = None
) -> str:
    """Write `report.html`, and what follows it, into a run's folder, from what its manifests say is committed.

    Args:
        sink: the recipe's sink section, or its folder alone.
        results: how many to show with pictures, about; None for all.
        score_model: says how near pictures are to what was asked for; without, no such score is shown.

    Returns:
        Where the report stands, as a URL or path.

    Raises:
        SinkError: no run is there, or the report cannot be written.
    """
    run = RunFolder(sink)
    refuse_links(run.sink)
    written = set()
    for path, text in render_report(run, results, score_model):
        put_over_ours(run.fs, f"{run.root}/{path}", text.encode("utf-8", "replace"), MARKS[posixpath.splitext(path)[1]])
        written.add(path)
    _remove_others(run, written)
    return f"{run.sink.folder.rstrip('/')}/report.html"


def _remove_others(run: RunFolder, written: Iterable[str]) -> None:
    """An earlier report may have had more pages. What is not named like one is somebody else's."""
    for path in list_folder(run.fs, f"{run.root}/report"):
        name = posixpath.basename(path)
        if f"report/{name}" not in written and re.fullmatch(r"page-\d{4,}\.html|index\.js", name):
            remove(run.fs, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a report shows, before any picture is read."""

    refs: Sequence[ResultRef]
    failures: Sequence[Mapping[str, str]]
    rows: Sequence[ImageRow]  # those that are shown, in their order
    verdicts: Verdicts
    gains: Gains
    sorted: bool  # worst first; else as in the data

    @classmethod
    def of(cls, run: RunFolder, results: int | None, model: ImageTextModel | None) -> Chosen:
        """Read figures and failures, choose, score, sort."""
        most = None if results is None else max(MAX_UNITS, results)
        spans = {kind: run.spans(kind) if most is None else spread(run.spans(kind), most) for kind in KINDS}
        refs = run.figures([*spans["data"], *spans["rejected"]])
        failures = list(run.failures(spans["quarantine"]))
        verdicts = {key_of(ref): judge(ref.figures) for ref in refs}
        rows = images_of(refs, failures)
        if results is not None:
            rows = choose(rows, verdicts, results)
        gains: dict[ResultKey, float] = {}
        if model is not None:
            gains = model_gains(run, [ref for row in rows for ref in row.refs], model)
            verdicts |= {key_of(ref): judge(ref.figures, gains.get(key_of(ref))) for ref in refs}
        is_sorted = sum(row.size for row in rows) <= MAX_SORTED
        return cls(
            refs=refs,
            failures=failures,
            rows=worst_first(rows, verdicts) if is_sorted else rows,
            verdicts=verdicts,
            gains=gains,
            sorted=is_sorted,
        )


def model_gains(run: RunFolder, refs: Sequence[ResultRef], model: ImageTextModel) -> dict[ResultKey, float]:
    """How much nearer each edit is to its request than its input was, in points."""
    found = {}
    for portion in run.portions(refs):
        for result in run.load(portion):
            gain = text_gain(result, model)
            if gain is not None:
                found[key_of(result.ref)] = gain
    return found


def render_report(
    run: RunFolder, results: int | None = MAX_RESULTS, model: ImageTextModel | None = None
) -> Iterator[tuple[str, str]]:
    """The report's files, one after the other: (path relative to the run's folder, text)."""
    chosen = Chosen.of(run, results, model)
    pages = pages_of(chosen.rows, PAGE_RESULTS)
    common = common_values(run, chosen, pages, model)
    entries: list[list[Any]] = []
    for number, rows in enumerate(pages, 1):
        cards = cards_of(run, rows, chosen)
        if common["indexed"]:
            entries += index_entries(number, cards)
        values = common | {
            "number_of_page": number,
            "cards": cards,
            "parts": part_links(pages, number),
            "shown_here": sum(row.size for row in rows),
            "indexed": common["indexed"] and path_from(number, INDEX_PATH),
        }
        if number == 1:
            values |= overview_values(run, chosen)
        yield page_path(number), page_template("report/page.html.j2").render(values)
    if common["indexed"]:
        yield INDEX_PATH, index_script(entries)


def page_path(number: int) -> str:
    """Where a page stands, relative to the run's folder."""
    return "report.html" if number == 1 else f"report/page-{number:04d}.html"


def path_from(number: int, path: str) -> str:
    """The way from a page to another file of the report."""
    return path if number == 1 else posixpath.relpath(path, "report")


def common_values(
    run: RunFolder, chosen: Chosen, pages: Sequence[Sequence[ImageRow]], model: ImageTextModel | None
) -> dict[str, Any]:
    """What every page says."""
    totals = run.totals
    size, asked = sum(row.size for row in chosen.rows), totals.done + totals.rejected_rows + totals.failed
    refs = [ref for row in chosen.rows for ref in row.refs]
    return {
        "title": run.name,
        "version": pipeline.__version__,
        "max_psnr": int(MAX_PSNR),
        "limits": verdict,
        "results_note": results_note(chosen, size, asked),
        "complete": size >= asked,
        "methods": sorted({ref.method for ref in refs}),
        "edits": sorted({ref.edit for ref in refs}),
        "score_model": model.name if model else "",
        "page_count": len(pages),
        "shown_in_all": size,
        "gated": bool(run.gates),
        "indexed": len(pages) > 1 and size <= MAX_INDEXED,
    }


def overview_values(run: RunFolder, chosen: Chosen) -> dict[str, Any]:
    """What the first page alone says."""
    counts = overview.RunCounts.of(run)
    kept = [ref for ref in chosen.refs if not ref.is_rejected]
    scored = overview.scored_of(kept, chosen.verdicts, chosen.gains)
    reasons = overview.failure_table(chosen.failures)
    lines = overview.method_lines(scored, chosen.failures)
    return {
        "lead": counts.sentence(),
        "bar": overview.bar(counts, scored),
        "tiles": overview.tiles(counts, scored),
        "failures": reasons[: overview.MAX_LINES],
        "failures_note": overview.failures_note(counts, len(chosen.failures), len(reasons)),
        "lines": lines[: overview.MAX_LINES],
        "lines_note": overview.lines_note(len(kept), counts.done, len(lines)),
        "gates": gates.gate_lines(run, chosen.refs),
        "gates_note": gates.note(run, chosen.refs),
        "reasons": gates.reasons(chosen.refs),
        "drawing": overview.drawing(scored),
        "facts": overview.facts(run),
    }


def results_note(chosen: Chosen, size: int, asked: int) -> str:
    """Which results are shown, in which order, and how to see the others."""
    order = "Worst first." if chosen.sorted else "In the order of the data, on each page the worst first."
    if size >= asked:
        return f"All {count(size, 'result')}. {order}"
    return (
        f"{size:,} of {count(asked, 'result')}: of every method and edit the worst, and others spread over the rest. "
        f"{order}"
    )


def cards_of(run: RunFolder, rows: Sequence[ImageRow], chosen: Chosen) -> list[dict[str, Any]]:
    """The pictures of a page. A long report follows the data from page to page; inside one the worst come first."""
    here = rows if chosen.sorted else worst_first(rows, chosen.verdicts)
    firsts = {key_of(row.refs[0]) for row in here if row.refs}  # whose input is shown, for all of the row
    pictures: dict[ResultKey, Pictures] = {}
    with ThreadPoolExecutor(READERS) as pool:  # decoding and encoding run outside of Python's lock
        for portion in run.portions([ref for row in here for ref in row.refs]):
            made = pool.map(lambda result: pictures_of(result, key_of(result.ref) in firsts), run.load(portion))
            pictures |= zip(map(key_of, portion), made, strict=True)
    return [image_card(row, pictures, chosen.verdicts, chosen.gains) for row in here]


def part_links(pages: Sequence[Sequence[ImageRow]], number: int) -> list[dict[str, Any]]:
    """The report's pages as seen from one of them: all from the first, else the first, the last and the neighbours."""
    near = {1, len(pages), *range(number - 2, number + 3)}
    return [
        {
            "number": at,
            "href": path_from(number, page_path(at)),
            "here": at == number,
            "first": rows[0].id if rows else "",
            "last": rows[-1].id if rows else "",
        }
        for at, rows in enumerate(pages, 1)
        if number == 1 or at in near
    ]


def index_entries(number: int, cards: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """What the filters of other pages may know of a page: one entry per result, as page.js reads it."""
    for card in cards:
        for tile in card["tiles"]:
            words = [card["id"], card["caption"], tile.get("target_prompt", ""), tile.get("prompts", "")]
            concepts = json.loads(tile["names"])
            text = " ".join(filter(None, [*words, *concepts]))
            yield [number, tile["edit"], tile["method"], tile["outcomes"], concepts, text]


def index_script(entries: Sequence[list[Any]]) -> str:
    """The index of a report of several pages. A script, not JSON: a page opened from disk may load that alone."""
    return f"shardeditIndex = {json.dumps(entries, separators=(',', ':'))};\n"


__all__ = ["render_report", "write_report"]
