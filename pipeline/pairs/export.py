"""`shardedit export RUN ...`: results of finished runs in the columns that a trainer reads, split by source image.

Two readings: the first takes the digests of every row, which decide duplicates, splits and files (`plan.py`); the
second writes (`export_files.py`). Memory is bounded by some row groups. A file is there as a whole or not at all and
its bytes follow from the runs and the settings alone, so a second command after a kill writes the files that are
missing, and ends in the same bytes. Signatures have a time: of signed pictures that is true but for these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pipeline
from pipeline.common.showing import public_url
from pipeline.errors import RecipeError, SinkError
from pipeline.looking.results import RunFolder
from pipeline.pairs.export_card import Said, Written, card
from pipeline.pairs.export_files import ExportFiles
from pipeline.pairs.hub import Push, Repository
from pipeline.pairs.plan import Plan, planned
from pipeline.pairs.preferences import BY_GATES, Better, score_of
from pipeline.pairs.presets import PRESETS, SIMILARITIES, Preset, PresetName
from pipeline.pairs.results import ACCEPTED, Results
from pipeline.pairs.signing import Signer, Signing
from pipeline.reading.storage import is_local, open_fs
from pipeline.writing.files import from_json, get, list_folder, put, put_made
from pipeline.writing.summary import SUMMARY_FILE

RECORD, CARD = "export.json", "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What to write, and how."""

    runs: tuple[str, ...]
    out: str
    preset: PresetName
    validation: float = 0.02  # share of the source images
    shard_bytes: int = 500_000_000
    mask_rle: bool = False  # a column with masks as COCO's run lengths
    with_rejected: bool = False  # what gates rejected, too, with two columns that say so
    score: str | None = None  # figure by which pairs of preference are chosen; None: by gates
    better: Better | None = None  # which end of it
    min_margin: float = 0.0  # between better and worse, in the score's unit
    said: Said = field(default_factory=Said)
    push: Push | None = None
    signing: Signing | None = None
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written."""

    splits: dict[str, int]  # rows
    duplicates: int  # left out
    rejected: int  # left out
    files: tuple[str, ...]
    written: int  # of these, by this command
    pushed: str | None  # address of the commit
    notes: tuple[str, ...]  # what a reader of the columns must know


def export(config: ExportConfig, say: Callable[[str], None] = lambda _: None) -> Export:
    """Write the results of runs as a set for a trainer.

    Raises:
        RecipeError: the preset's columns cannot be filled, a split cannot be made, or settings do not go together.
        SinkError: a run is not done or cannot be read, the folder or the repository holds something else.
    """
    preset = PRESETS[config.preset]
    fs, root = open_fs(config.out, config.storage_options)
    _refuse_settings(config, preset, on_this_machine=is_local(fs))
    signer = Signer(config.signing) if config.signing else None
    runs = [RunFolder(url) for url in config.runs]
    for run in runs:
        _refuse_unfit(run)
    repository = Repository(config.push, RECORD) if config.push else None
    results = Results(runs)
    score = score_of(config.score, config.better, results.figures()) if preset.pairs else None
    plan = planned(
        results,
        preset,
        config.preset,
        validation=config.validation,
        with_rejected=config.with_rejected,
        score=score,
        margin=config.min_margin,
    )
    files = ExportFiles(
        preset,
        results,
        plan,
        shard_bytes=config.shard_bytes,
        mask_rle=config.mask_rle,
        with_rejected=config.with_rejected,
        score=score.name if score else BY_GATES,
        signer=signer,
    )
    about = _about(config, runs)
    if repository is not None:
        repository.refuse_another(about)
    _claim(fs, root, config, about)
    there = {path.rpartition("/")[2] for path in list_folder(fs, f"{root}/data")}
    missing = [name for name in files.names if name not in there]
    for name in missing:
        put_made(fs, f"{root}/data/{name}", partial(files.write, name), lambda _, name=name: name)  # type: ignore[misc]
        say(f"data/{name}: {files.names[name]:,} rows")
    sizes = {f"data/{name}": int(fs.info(f"{root}/data/{name}")["size"]) for name in files.names}
    rows = {split: len(items) for split, items in plan.splits.items() if items}
    notes = tuple(_notes(plan, preset, results.figures()))
    written = Written(
        preset=config.preset,
        schema=files.schema,
        data={split: [f"data/{name}" for name in files.of_split(split)] for split in rows},
        sizes=sizes,
        rows=rows,
        notes=notes,
        score=(score.name if score else BY_GATES) if preset.pairs else None,
        is_signed=signer is not None,
    )
    put(fs, f"{root}/{CARD}", card(written, plan, runs, config.said).encode("utf-8", "replace"))
    return Export(
        splits=rows,
        duplicates=plan.left.duplicates,
        rejected=plan.left.rejected,
        files=tuple(files.names),
        written=len(missing),
        pushed=repository.push(Path(root), [*sizes, RECORD, CARD]) if repository is not None else None,
        notes=notes,
    )


def _refuse_settings(config: ExportConfig, preset: Preset, *, on_this_machine: bool) -> None:
    """Settings that do not go together, or that this preset would pass over."""
    problems = []
    of_pairs = (("score", config.score), ("better", config.better), ("min_margin", config.min_margin or None))
    if not preset.pairs:
        with_pairs = ", ".join(name for name, one in PRESETS.items() if one.pairs)
        problems += [
            (name, f"is for pairs of better and worse: presets {with_pairs}")
            for name, value in of_pairs
            if value is not None
        ]
    elif config.with_rejected:
        problems.append(("with_rejected", "is for single results: pairs take what gates rejected as the worse one"))
    elif config.mask_rle:
        problems.append(("mask_rle", "is for single results: pairs have no mask"))
    if config.min_margin and config.score is None:
        problems.append(("min_margin", "needs a --score, which it is a difference of"))
    if config.min_margin < 0:
        problems.append(("min_margin", "is below 0"))
    if config.push is not None and not on_this_machine:
        problems.append(("push_to", "needs an --out on this machine: hubs take files from a disk"))
    if problems:
        raise RecipeError("export", problems)


def _refuse_unfit(run: RunFolder) -> None:
    where = public_url(run.sink.folder)
    sink = run.record["recipe"]["sink"]
    there = sum(span.rows for span in run.spans(ACCEPTED))
    if not (run.summary or {}).get("complete"):
        raise SinkError(f"{where} is not done: a part would be exported for the whole. Run its `shardedit edit` again")
    if there != (counted := _counted(run)):
        raise SinkError(
            f"{where} is not whole: its summary.json counts {counted:,} results, and {there:,} are there. See what is "
            "missing with `shardedit verify`; its `shardedit edit` makes that again"
        )
    if sink["format"] != "parquet":
        raise RecipeError(where, [("sink.format", "is webdataset: runs in Parquet are exported")])
    if not (sink["include_input"] or sink["columns"] == "instructpix2pix"):
        raise RecipeError(
            where,
            [("sink.include_input", "is false: the inputs are not in the run. Edit with sink.include_input=true")],
        )


def _counted(run: RunFolder) -> int:
    """Rows that the run had when it ended."""
    data = get(run.fs, f"{run.root}/{SUMMARY_FILE}")
    return int(from_json(data or b"{}").get("rows", -1))


def _about(config: ExportConfig, runs: Sequence[RunFolder]) -> bytes:
    """What the set is made of: a second command with anything else is another export."""
    about = {
        "preset": config.preset,
        "validation": config.validation,
        "shard_bytes": config.shard_bytes,
        "mask_rle": config.mask_rle,
        "with_rejected": config.with_rejected,
        "score": config.score,
        "better": config.better,
        "min_margin": config.min_margin,
        "said": asdict(config.said),
        "is_signed": config.signing is not None,
        "version": pipeline.__version__,
        "runs": [
            {"recipe_hash": run.record["recipe_hash"], "model": run.record["model"], "rows": run.totals.done}
            for run in runs
        ],
    }
    return json.dumps(about, indent=1, sort_keys=True).encode()


def _claim(fs: Any, root: str, config: ExportConfig, about: bytes) -> None:
    """Say what the folder is for, before anything is in it."""
    before = get(fs, f"{root}/{RECORD}")
    if before is not None and before != about:
        raise SinkError(f"{public_url(config.out)} holds another export: of other runs or settings. Give another --out")
    if before is None and list_folder(fs, f"{root}/data"):
        raise SinkError(f"{public_url(config.out)} holds data that no export wrote. Give another --out")
    if before is None and get(fs, f"{root}/{CARD}") is not None:
        raise SinkError(f"{public_url(config.out)} holds a {CARD} that no export wrote. Give another --out")
    if before is None:
        put(fs, f"{root}/{RECORD}", about)


def _notes(plan: Plan, preset: Preset, figures: set[str]) -> Iterator[str]:
    unknown = [name for name, figure in SIMILARITIES.items() if name in preset.columns and figure not in figures]
    if unknown:
        yield f"{', '.join(unknown)} are empty: no gate of these runs measured them"
    if "caption" in preset.columns:
        yield f"`caption` is the {plan.captions.replace('_', ' ')} of each pair"
    if plan.left.no_pair:
        why = ", ".join(f"{count:,} times {reason}" for reason, count in plan.left.no_pair.most_common())
        yield f"no pair of {plan.left.no_pair.total():,} instruction(s): {why}"
