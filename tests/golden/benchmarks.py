"""Replays of drawn miniatures of the field's benchmarks, through `evaluate` as a user calls it.

Their expected values come from the official code, run on the same pictures and canned answers.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.benchmarks.pie_bench import decode_mask, items_of
from pipeline.evaluation.config import evaluation_from
from pipeline.evaluation.job.run import evaluate
from pipeline.evaluation.judging.answers import Read, read_imgedit, read_viescore
from pipeline.evaluation.judging.asking import Answer, Judge
from pipeline.evaluation.judging.questions import Question
from pipeline.evaluation.score_rows import rows_in
from pipeline.evaluation.statistics import Score, Settings, compare_all, describe
from pipeline.remote.tries import RowFailedError
from pipeline.settings.judge import JudgeConfig
from tests.golden.checks import Check

Row = dict[str, Any]


def as_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def evaluated(data: Mapping[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """Rows and summary of an evaluation, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        config = evaluation_from({**data, "sink": {"folder": folder}, "statistics": {"resamples": 199}})
        evaluate(config, progress="off")
        rows = [
            row for path in sorted(Path(folder, "evaluate", "rows").iterdir()) for row in rows_in(path.read_bytes())
        ]
        return rows, as_json(Path(folder, "evaluate", "summary.json"))


def far(ours: float | None, golden: float | None, kind: str = "abs") -> float:
    """How far a number is from the golden one; infinitely, where one of them is none."""
    golden = None if golden is not None and math.isnan(golden) else golden
    if ours is None or golden is None:
        return 0.0 if ours is golden else math.inf
    return abs(ours - golden) / (abs(golden) or 1.0 if kind == "rel" else 1.0)


def replay_pie(folder: Path) -> Iterator[Check]:
    """PIE-Bench: masks, prompts, every measure of every row, means with their n."""
    golden, entries = as_json(folder / "expected" / "items.json"), as_json(folder / "mapping_file.json")
    for item in items_of(Folder(str(folder))):
        known, path = golden["items"].get(item.key), folder / "expected" / "masks" / f"{item.key}.png"
        if path.exists():
            mask = np.asarray(Image.open(path).convert("L")) > 127
            yield Check(f"mask of {item.key}", float((decode_mask(entries[item.key]["mask"]) != mask).sum()), 0)
        if known is not None:
            ours = [item.request.source_prompt, item.request.target_prompt, item.edit_type]
            # A request has no blanks around its prompts, which no text encoder reads.
            named = [known[name].strip() for name in ("original_prompt", "editing_prompt", "editing_type_id")]
            yield Check(f"prompts and type of {item.key}", float(ours != named), 0)
        else:  # one that no number is known of
            yield Check(f"{item.key} is excluded", float(not item.problem), 0)
    models = {as_json(one)["model_type"]: str(one.parent) for one in sorted(folder.glob("models/*/config.json"))}
    clip, dino = models["clip"], models["vit"]
    methods = {one.name: str(one) for one in sorted((folder / "output").iterdir())}
    data = {"set": {"kind": "pie_bench", "folder": str(folder)}, "results": methods}
    rows, summary = evaluated({**data, "metrics": {"clip": clip, "dino": dino}})
    first = dict(list(methods.items())[:1])  # one method tells whether the setting acts
    smooth, _ = evaluated({**data, "results": first, "metrics": {"dino": dino, "antialias": True}})
    for row in rows:
        for other in smooth:
            if (other["item"], other["method"]) == (row["item"], row["method"]):
                row["structure_distance_antialias"] = other["structure_distance"]
    worst: dict[str, Check] = {}
    for row in [row for row in rows if row["item"] in golden["items"]]:
        # A method without a result for an item stands there without figures, or not at all.
        for name, value in (golden["items"][row["item"]]["methods"].get(row["method"]) or {}).items():
            if name in NOT_OURS or (name == "structure_distance_antialias" and name not in row):
                continue
            ours: Any = "psnr_infinite" in row["notes"] if name == "psnr_infinite" else row.get(name)
            kind, tolerance = KINDS_OF.get(name, ("abs", 1e-3))
            check = Check(name, far(ours, value, kind), tolerance)
            if name not in worst or check.deviation > worst[name].deviation:
                worst[name] = check
    yield from worst.values()
    yield Check("rows", abs(len(rows) - len(methods) * len(entries)), 0)
    for method, groups in as_json(folder / "expected" / "aggregates.json").items():
        mine = [row for row in rows if row["method"] == method]
        for name in summary["measures"]:
            for group, means in groups.items():
                if name in means:
                    yield from _pie_mean(f"{method} {group} {name}", name, mine, group, means[name])
            if name in groups["all"]:
                ours = summary["measures"][name][method]["own"]["n"]
                yield Check(f"{method} {name}: n of the table", abs(ours - groups["all"][name]["n"]), 0)


def _pie_mean(label: str, name: str, rows: list[Row], group: str, golden: Mapping[str, Any]) -> Iterator[Check]:
    values = [row[name] for row in rows if _is_in(row, group) and row[name] is not None]
    mean = math.fsum(values) / len(values) if values else None
    kind, tolerance = KINDS_OF[name]
    yield Check(label, far(mean, golden["mean"], kind), tolerance)
    yield Check(f"{label}: n", abs(len(values) - golden["n"]), 0)


KINDS_OF: dict[str, tuple[str, float]] = {
    "mse_unedit_part": ("rel", 1e-4),
    "psnr_unedit_part": ("abs", 1e-3),
    "psnr_unedit_part_area_normalised": ("abs", 1e-3),
    "psnr_infinite": ("abs", 0),
    "ssim_unedit_part": ("abs", 1e-4),
    "structure_distance": ("rel", 2e-3),
    "structure_distance_antialias": ("rel", 2e-3),
    **dict.fromkeys(("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"), ("abs", 5e-4)),
    **dict.fromkeys(
        (
            "clip_similarity_source_image",
            "clip_similarity_target_image",
            "clip_similarity_target_image_edit_part",
        ),
        ("abs", 0.05),
    ),
}
NOT_OURS = {"ssim_unedit_part_reflect_padded"}  # of a later torchmetrics, which no published number was made with


def _is_in(row: Row, group: str) -> bool:
    return group == "all" or (row["edit_type"] != "9" if group == "without_style" else row["edit_type"] == group)


class Canned(Judge):
    """Answers as a file has them, by attempt: the folder stands in the judge's `model`."""

    def __init__(self, config: JudgeConfig) -> None:
        folder = Path(config.model)
        self._answers: dict[tuple[str, str, str], list[str]] = {}
        self._asked: Counter[tuple[str, str, str]] = Counter()
        if (lines := folder / "answers.jsonl").exists():
            for line in map(json.loads, lines.read_text(encoding="utf-8").splitlines()):
                # A key is unique within a language alone; files whose keys differ need not name it.
                language = line.get("instruction_language") or line.get("language")
                key = f"{language}-{line['key']}" if language else line["key"]
                for part in ("SC", "PQ"):
                    self._answers[line["method"], key, part.lower()] = as_list(line[part])
        else:
            for method, by_key in as_json(folder / "answers.json").items():
                self._answers |= {(method, key, "edit"): as_list(answers) for key, answers in by_key.items()}

    def answer(self, question: Question) -> Answer:
        key, _, method = question.row.split("\x1f")
        place = (method, key, question.part)
        if place not in self._answers:
            place = (method, key.removeprefix("en-").removeprefix("cn-"), question.part)
        attempt = self._asked[place]
        self._asked[place] += 1
        answers = self._answers.get(place)
        if not answers:
            raise RowFailedError("no_answer_recorded")
        answer = answers[min(attempt, len(answers) - 1)]
        if not isinstance(answer, str):  # {"error": ...} stands for a request that failed
            raise RowFailedError("error_recorded")
        return Answer(text=answer)


def as_list(answers: Any) -> list[Any]:
    return answers if isinstance(answers, list) else [answers]


def _judged(folder: Path, kind: str, set_folder: Path, methods: Mapping[str, Path], protocol: str) -> Any:
    judge = {"kind": "tests.golden.benchmarks:Canned", "model": str(folder), "protocol": protocol, "concurrency": 1}
    results = {name: str(path) for name, path in methods.items()}
    return evaluated({"set": {"kind": kind, "folder": str(set_folder)}, "results": results, "judge": judge})


def replay_gedit(folder: Path) -> Iterator[Check]:
    """GEdit-Bench: parsing, missing rows, every row's scores, the official script's aggregates; Parquet and Arrow."""
    yield from _parsed(folder, lambda case: read_viescore(case["answer"], case["finish_reason"]))
    methods = {path.name: path for path in sorted((folder / "results").iterdir())}
    for name in ("dataset", "dataset_arrow"):
        if not (folder / name).exists():
            continue
        rows, summary = _judged(folder, "gedit_bench", folder / name, methods, "viescore")
        missing = [
            {"method": row["method"], "key": row["facts"]["key"], "missing": row["reason"].removeprefix("missing_")}
            for row in rows
            if row["reason"]
        ]
        golden = as_json(folder / "expected" / "missing.json")
        short = [{key: one[key] for key in ("method", "key", "missing")} for one in golden]
        for one in missing:
            one["missing"] = {"result": "edited"}.get(one["missing"], one["missing"])
        order = lambda one: (one["method"], one["key"])  # noqa: E731
        yield Check(f"{name}: missing rows", float(sorted(missing, key=order) != sorted(short, key=order)), 0)
        for method in methods:
            yield from _gedit_method(folder, f"{name} {method}", method, rows, summary)


def _gedit_method(folder: Path, label: str, method: str, rows: list[Row], summary: Any) -> Iterator[Check]:
    mine = {(row["language"], row["facts"]["key"]): row for row in rows if row["method"] == method}
    golden = as_json(folder / "expected" / f"rows_{method}.json")["rows"]
    for name, column in (("semantics", "judge_sc"), ("quality", "judge_pq")):
        worst = max((far(mine[row["language"], row["key"]][column], row[name]) for row in golden), default=0.0)
        yield Check(f"{label} rows: {name}", worst, 1e-6)
    scored = [row for row in mine.values() if row["judge_overall"] is not None]
    yield Check(f"{label} rows", abs(len(scored) - len(golden)), 0)
    flags = [mine[row["language"], row["key"]]["facts"]["intersection"] != row["intersection"] for row in golden]
    yield Check(f"{label} intersection", float(sum(flags)), 0)
    for language, parts in as_json(folder / "expected" / f"aggregates_{method}.json")["languages"].items():
        for part, groups in parts.items():
            ours = summary["official"][method].get(language, {}).get(part, {})
            yield Check(f"{label} {language} {part}", max(far(ours.get(name), groups[name]) for name in groups), 1e-6)


def replay_imgedit(folder: Path) -> Iterator[Check]:
    """ImgEdit-Bench: parsing, missing rows, the official scripts' scores."""
    yield from _parsed(
        folder, lambda case: read_imgedit(case["answer"], case["edit_type"], case.get("finish_reason", "stop"))
    )
    methods = {path.name: path for path in sorted((folder / "edited").iterdir())}
    rows, summary = _judged(folder, "imgedit_bench", folder, methods, "imgedit")
    lacks = ("missing_result", "missing_image")
    missing = sorted((row["method"], row["item"]) for row in rows if row["reason"] in lacks)
    golden = sorted((one["method"], one["key"]) for one in as_json(folder / "expected" / "missing.json"))
    yield Check("missing rows", float(missing != golden), 0)
    for method in methods:
        expected, ours = as_json(folder / "expected" / f"scores_{method}.json"), summary["official"][method]
        for name in ("average_score", "type_score", "n"):
            yield Check(f"{method} {name}: keys", float(set(ours[name]) != set(expected[name])), 0)
            worst = max((far(ours[name].get(key), value) for key, value in expected[name].items()), default=0.0)
            yield Check(f"{method} {name}", worst, 1e-6)
        for name in ("overall_mean_of_types", "overall_mean_of_items"):
            yield Check(f"{method} {name}", far(ours[name], expected[name]), 1e-6)


def _parsed(folder: Path, read: Callable[[Any], Read]) -> Iterator[Check]:
    for case in as_json(folder / "parse_cases.json"):
        found, required = read(case), case["required"]
        if required["status"] == "ok":
            wrong = (
                found.reason or list(found.scores) != required["scores"] or set(found.flags) != set(required["flags"])
            )
        else:
            wrong = found.reason != required["reason"]
        yield Check(f"answer {case['name']}", float(bool(wrong)), 0)


def replay_stats(folder: Path) -> Iterator[Check]:
    """Means, medians, intervals, wins and p values."""
    data, golden = as_json(folder / "values.json"), as_json(folder / "expected.json")
    scores = {
        method: [
            Score(image=str(at), item=str(at), edit_type=kind, value=value)
            for at, (kind, value) in enumerate(zip(data["type"], values, strict=True))
            if value is not None
        ]
        for method, values in data["values"].items()
    }
    settings = Settings(seed=0)
    for method, expected in golden["methods"].items():
        ours = describe(scores[method], settings)
        for name in ("mean_of_items", "median", "mean_of_types"):
            yield Check(f"{method} {name}", far(getattr(ours, name), expected[name]), 1e-9)
        yield Check(f"{method} n", abs(ours.n - expected["n"]), 0)
        for kind, one in expected["types"].items():
            yield Check(f"{method} type {kind}", far(ours.types[kind].mean, one["mean"]), 1e-9)
            yield Check(f"{method} type {kind}: n", abs(ours.types[kind].n - one["n"]), 0)
    for correction in ("holm", "bonferroni"):
        compared = compare_all(scores, Settings(seed=0, correction=correction))
        by_pair = {(one.first, one.second): one for one in compared}
        for expected in golden["pairs"]:
            one = by_pair[tuple(expected["pair"])]
            name = " ".join(expected["pair"])
            counts = [getattr(one, key) - expected[key] for key in ("n", "wins", "ties", "losses")]
            yield Check(f"{name} counts", float(any(counts)), 0)
            yield Check(f"{name} mean", far(one.mean_difference, expected["mean_difference"]), 1e-9)
            golden_ends = expected["ci95_bca"] or (None, None)
            ends = [far(ours, end) for ours, end in zip(one.interval or (None, None), golden_ends, strict=True)]
            yield Check(f"{name} interval", max(ends), 0.02)
            yield Check(f"{name} p", far(one.p, expected["p_wilcoxon_pratt"], "rel"), 1e-6)
            yield Check(f"{name} p, {correction}", far(one.p_adjusted, expected[f"p_{correction}"], "rel"), 1e-6)


SETS: dict[str, Callable[[Path], Iterator[Check]]] = {
    "pie_mini": replay_pie,
    "gedit_mini": replay_gedit,
    "imgedit_mini": replay_imgedit,
    "stats_mini": replay_stats,
}
"""By the beginning of the folder's name."""


def set_of(path: Path) -> tuple[Callable[[Path], Iterator[Check]], Path] | None:
    """What replays a folder, or a file in one; None: it is none of these."""
    for folder in (path, *path.parents):
        for name, replay in SETS.items():
            if folder.is_dir() and folder.name.startswith(name):
                return replay, folder
    return None
