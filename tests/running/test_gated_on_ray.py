"""Gates and several attempts on Ray: the bytes of the plain loop, and no question that is asked twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.running import driver
from tests.evaluation.fake_judge import Reply, fake_judge
from tests.running.test_gated_runs import checked, gated, rows
from tests.runs import contents, write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # a cluster has to start


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def script(digest: str, part: str, attempt: int) -> Reply:
    """Half of the results are good."""
    return Reply(content=f'{{"score": [{9 if int(digest, 16) % 2 else 3}, 9], "reasoning": "seen"}}')


def test_gates_attempts_and_a_judge_on_ray_write_the_bytes_of_the_plain_loop(two_cpus: None, tmp_path: Path) -> None:
    write_shards(tmp_path / "in", shards=2, rows=3)
    best = {"attempts": 2, "vary": [{"new_seed": False, "threshold": 0.5}]}
    with fake_judge(script) as judge:
        judged: dict[str, Any] = {
            "judge": {"base_url": judge.url, "model": "fake", "tries": 1},
            "judge_overall": {"min": 7},
            "denoise_gain": {"min": -1e9},
        }
        gates = {"preset": "none", "change_inside": {"min": 1}, **judged}
        plain = gated(tmp_path, "plain", gates, best_of=best)
        driver.run(plain, progress="off")
        asked = judge.asked.total()
        assert set(judge.asked.values()) == {1}
        run = plain.run.model_copy(update={"engine": "ray", "workers": 2})
        on_ray = plain.model_copy(
            update={"run": run, "sink": plain.sink.model_copy(update={"folder": str(tmp_path / "ray")})}
        )
        summary = driver.run(on_ray, progress="off")
        assert judge.asked.total() == 2 * asked
        assert contents(tmp_path / "ray") == contents(tmp_path / "plain")
        assert summary.rejected_rows == len(rows(on_ray, "rejected")) > 0
        assert {row["attempt"] for row in rows(on_ray, "data")} == {0, 1}
        assert checked(on_ray).findings == []
