"""The host benchmark: what it counts, which jobs it has, and that all of it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import host
from benchmarks.copies import Counting
from benchmarks.jobs import MAIN, MASACTRL_AUTO, MIXED, others
from pipeline.editing import EDITORS
from pipeline.inversion import INVERSIONS
from tests.facts import editor_facts

FIGURES = {
    "busy_share",
    "blocking_copies_per_call",
    "kernels_outside_per_call",
    "host_us_per_row",
    "padded_share",
}


class Network(torch.nn.Module):
    """Two kernels."""

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return (numbers + 1.0) * 2.0


@pytest.mark.parametrize(
    ("work", "blocking", "kernels"),
    [
        (lambda device: torch.zeros(3).to("meta"), 1, 0),
        (lambda device: torch.zeros(3).to("meta", non_blocking=True), 0, 0),
        (lambda device: device.cpu(), 1, 0),
        (lambda device: device.to("cpu", torch.float64), 1, 0),
        (lambda device: device.to("cpu", non_blocking=True), 0, 0),
        (lambda device: torch.zeros(3).copy_(device), 1, 0),
        (lambda device: torch.zeros(3).copy_(device, non_blocking=True), 0, 0),
        (lambda device: device.copy_(torch.zeros(3)), 1, 0),
        (lambda device: device.to(torch.float64), 0, 1),
        (lambda device: device.copy_(device + 1.0), 0, 2),
        (lambda device: device[None].expand(2, 3)[0].detach(), 0, 0),
        (lambda device: torch.empty_like(device), 0, 0),
        (lambda device: torch.zeros(3) + 1.0, 0, 0),
        (lambda device: Network()(device), 0, 2),
        (lambda device: NETWORK(device), 0, 0),
        (lambda device: NETWORK(device) - NETWORK(device), 0, 1),
    ],
)
def test_copies_block_unless_they_ask_not_to_and_kernels_count_outside_of_the_network(
    work: Any, blocking: int, kernels: int
) -> None:
    device = torch.empty(3, device="meta")
    counting = Counting()
    with counting.watching(NETWORK):
        work(device)
    assert (counting.blocking, counting.kernels) == (blocking, kernels)


NETWORK = Network()


def test_every_method_is_measured() -> None:
    jobs = [*MAIN, MASACTRL_AUTO, *others()]
    measured = {part["method"] for job in jobs for part in (job.inversion, job.editing)}
    of_other_models = {name for name in EDITORS if editor_facts(name).served_elsewhere}
    missing = (set(EDITORS) | set(INVERSIONS)) - measured - of_other_models
    assert not missing, f"no job that WORDS are enough for: add one to benchmarks/jobs.py for {', '.join(missing)}"
    assert len({job.name for job in jobs}) == len(jobs)


def test_a_smaller_job_warms_up_within_its_steps() -> None:
    recipe = MIXED.smaller(steps=6).recipe()
    warmups = [concept.warmup_steps for edit in recipe.edits.values() for concept in edit.concepts]
    assert recipe.inversion.num_steps == 6
    assert warmups == [5, 5, 5, 5, 5, 5]
    assert [one.warmup_steps for edit in MIXED.recipe().edits.values() for one in edit.concepts] == [
        *(5, 10, 15),
        *(12, 24, 36),
    ]


def test_the_whole_benchmark_runs_on_a_small_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "BUILD", tmp_path)
    monkeypatch.setattr("sys.argv", ["host", "--small"])
    host.main()
    rows = json.loads((tmp_path / "host.json").read_text())
    assert [(row["job"], row["model"]) for row in rows] == [
        (job.name, model.name) for job, model in host.cases(every_job=False)
    ]
    for row in rows:
        assert {"job", "model", "call_size"} | FIGURES <= set(row)
        assert 0.0 < row["busy_share"] <= 1.0
        assert 0.0 <= row["padded_share"] < 1.0
        assert min(row["host_us_per_row"], row["blocking_copies_per_call"], row["kernels_outside_per_call"]) >= 0
        assert row["device_seconds"] <= row["seconds"] + 0.1
    assert "busy share" in capsys.readouterr().out
