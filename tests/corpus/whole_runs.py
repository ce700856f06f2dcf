"""The rows of the corpus through whole runs: how each must end, and how it did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.corpus.archives import archive_cases
from tests.corpus.folders import make_folder
from tests.corpus.making import FORMATS, MAX_MEMBER, PNG, Case, Member, row_case, tar
from tests.corpus.pictures import picture_cases, text_cases
from tests.corpus.tables import table_cases


def make_corpus(root: Path) -> dict[str, list[Case]]:
    """Write every case below `root`, in a folder for each format; returns the cases by format."""
    cases: dict[str, list[Case]] = {format: [] for format in FORMATS}
    for format, made in (("webdataset", archive_cases()), ("parquet", table_cases())):
        (root / format).mkdir(parents=True)
        for case, data in made:
            (root / format / case.shard).write_bytes(data)
            cases[format].append(case)
    members: list[Member] = []
    for number, (kind, name, ext, data, outcome) in enumerate(picture_cases()):
        members.append((f"p{number:03d}.{ext}", data))
        cases["webdataset"].append(row_case(kind, name, "rows-pictures.tar", f"p{number:03d}", outcome))
    (root / "webdataset" / "rows-pictures.tar").write_bytes(tar(members))
    members = []
    for number, (kind, name, beside, outcome) in enumerate(text_cases()):
        members += [(f"t{number:03d}.{ext}", data) for ext, data in {"png": PNG, **beside}.items()]
        cases["webdataset"].append(row_case(kind, name, "rows-texts.tar", f"t{number:03d}", outcome))
    (root / "webdataset" / "rows-texts.tar").write_bytes(tar(members))
    (root / "folder").mkdir()
    cases["folder"] = list(make_folder(root / "folder"))
    return cases


def recipe_of(source: Path, out: Path, format: str) -> dict[str, Any]:
    """One edit, few steps, and no budget that would end the run."""
    return {
        "source": {"shards": str(source), "format": format, "max_member_bytes": MAX_MEMBER},
        "edits": {"concepts": [{"prompt": "hat"}]},
        "model": {"name": "analytic", "size": 32},
        "inversion": {"method": "ddpm", "num_steps": 2},
        "sink": {"folder": str(out)},
        "run": {
            "engine": "local",
            "unit_size": 64,
            "max_failed_fraction": 1.0,
            "max_consecutive_failed_units": 10**6,
        },
    }


@dataclass(frozen=True)
class Ends:
    """How the rows of a run ended."""

    edited: Counter[tuple[str, str]]  # (shard, id without the shard) -> results
    rejected: dict[tuple[str, str], tuple[str, str]]  # the same -> (stage, message)
    shards: frozenset[str]  # those whose last unit is committed

    @classmethod
    def of(cls, out: Path) -> Ends:
        """Read a run's folder."""
        edited: Counter[tuple[str, str]] = Counter()
        for path in (out / "data").glob("*.parquet"):
            for row in pq.read_table(path, columns=["id", "shard"]).to_pylist():
                edited[row["shard"], row["id"].removeprefix(row["shard"] + "/")] += 1
        rejected = {}
        for path in (out / "quarantine").glob("*.parquet"):
            for row in pq.read_table(path, columns=["id", "shard", "stage", "message"]).to_pylist():
                place = row["shard"], row["id"].removeprefix(row["shard"] + "/")
                assert place not in rejected, f"{place} is in quarantine twice"
                rejected[place] = row["stage"], row["message"]
        manifests = [json.loads(path.read_text()) for path in (out / "_units").glob("*/*.json")]
        return cls(edited, rejected, frozenset(unit["shard"] for unit in manifests if unit["is_last"]))

    def problems(self, case: Case) -> list[str]:
        """What did not come out as the case says."""
        found = []
        if case.shard not in self.shards:
            found.append("its shard was not finished")
        if case.row and (case.shard, case.row) not in {*self.edited, *self.rejected}:
            found.append("it vanished")
        for key in case.edited:
            if self.edited[case.shard, key] != 1:
                why = self.rejected.get((case.shard, key), ("", "it is nowhere"))[1]
                found.append(f"{key} was not edited: {why}")
        for key in case.rejected:
            if (case.shard, key) not in self.rejected:
                found.append(f"{key} was not quarantined")
        told = sum(shard == case.shard for shard, _ in self.rejected)
        if told < case.told:
            found.append(f"{told} rows in quarantine, not {case.told}")
        return found

    def outcome(self, case: Case) -> str:
        """In a word."""
        if case.row:
            place = case.shard, case.row
            return "edited" if place in self.edited else "rejected" if place in self.rejected else "gone"
        edited = any(shard == case.shard for shard, _ in self.edited)
        rejected = any(shard == case.shard for shard, _ in self.rejected)
        return {(True, True): "both", (True, False): "edited", (False, True): "rejected"}.get(
            (edited, rejected), "empty"
        )


def run_corpus(root: Path, run: Callable[[dict[str, Any]], Any]) -> dict[str, tuple[list[Case], Ends]]:
    """Make the corpus, edit it, and read what came out, by format."""
    cases = make_corpus(root / "in")
    found = {}
    for format in FORMATS:
        run(recipe_of(root / "in" / format, root / "out" / format, format))
        found[format] = cases[format], Ends.of(root / "out" / format)
    return found
