"""Do a run's records agree with each other, and with the source as it is listed now?

summary.json and the report derive from the manifests, and are written again by `shardedit verify --repair`. run.json
derives from nothing that is left: it is only said to be changed. The source decides what there is to edit: what it
lists and the run does not have was never asked for, or came later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import SourceError
from pipeline.looking.findings import STRAY
from pipeline.reading.listing import list_source
from pipeline.reading.storage import FileSystem
from pipeline.recipe import SourceConfig
from pipeline.writing.files import NotAFileError, get
from pipeline.writing.paths import first_problem
from pipeline.writing.run_record import RunRecord, input_differences, run_input
from pipeline.writing.summary import EXIT_CODES, STRICT_EXIT_CODE, SUMMARY_FILE, Summary

REPORT_FILE = "report.html"
# What the command adds to the manifests' numbers, and what depends on its error budget.
OF_THE_COMMAND = {"units_now", "outcome", "exit_code", "generation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FromSource:
    """What the source says of a run."""

    problems: tuple[tuple[str, str], ...] = ()  # (shard or address, what is wrong)
    left_out: str = ""  # what the source holds beside its shards, in a line
    unreachable: str = ""  # why it could not be listed; "" where it was
    rows: Mapping[str, int] = field(default_factory=dict)  # of unchanged shards whose footers or listing tell, by path


def look_at_source(record: RunRecord, source: SourceConfig) -> FromSource:
    """List the source again, and compare with what the run began with."""
    try:
        found = list_source(source)
    except SourceError as error:
        return FromSource(unreachable=str(error))
    now = run_input(found.shards)
    same = set(now) & set(record.input)
    paths = {path for path, _, _ in same}
    return FromSource(
        problems=tuple(input_differences(record.input, now)),
        left_out=found.note(),
        rows={shard.path: shard.rows for shard in found.shards if shard.rows is not None and shard.path in paths},
    )


def summary_problem(fs: FileSystem, root: str, now: Summary) -> tuple[str, str]:
    """What is wrong with the summary of a run that is done: the kind of finding and a sentence; "" for nothing.

    Args:
        fs: the file system.
        root: of the run's folder in it.
        now: what the manifests add up to, by the last driver's generation.

    Raises:
        SinkError: it cannot be read.
    """
    try:
        data = get(fs, f"{root}/{SUMMARY_FILE}")
        if data is None:
            return "summary", "is missing"
        stored = TypeAdapter(Summary).validate_json(data)
    except (NotAFileError, ValidationError) as error:
        return "summary", f"is no summary: {first_problem(error)}"
    wrong = "; ".join(_contradictions(asdict(stored), asdict(now)))
    if wrong and stored.generation < now.generation:
        return STRAY, f"is an earlier driver's, maybe of one that woke up: {wrong}"
    return "summary", wrong


def _contradictions(stored: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    for name, value in now.items():
        if name not in OF_THE_COMMAND and stored[name] != value:
            yield f"{name} is {stored[name]}, the manifests add up to {value}"
    ended = (stored["outcome"], stored["exit_code"])
    possible = {("complete with failures", STRICT_EXIT_CODE), *EXIT_CODES.items()} - {("stopped early", 1)}
    possible = {one for one in possible if (one[0] != "complete") == bool(now["failed"])}
    if ended not in possible:
        yield f"outcome is {ended[0]} with exit code {ended[1]}, and {now['failed']} failed"
