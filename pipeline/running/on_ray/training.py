"""Ray Train as what runs a training: several workers that share every batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.sparse_training import Workers
from pipeline.errors import ClusterError

RETRIES = 3  # of a training whose worker was lost: it goes on from its own last state


class Group(Workers):
    """The workers of a torch process group."""

    @override
    def total(self, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @override
    def any(self, tensor: Tensor) -> Tensor:
        found = tensor.to(torch.uint8)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return found.bool()


def run_workers(work: Callable[[Workers, int, int], None], workers: int, *, gpu: bool) -> None:
    """Run `work` in workers of Ray Train, each given the group, its rank and their number.

    A worker that is lost makes all begin anew, RETRIES times: `work` goes on from what it has written.

    Raises:
        ClusterError: Ray Train is not installed, or the training failed.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
        from ray.train.torch import TorchTrainer
    except (ImportError, RuntimeError) as error:
        raise ClusterError(
            "run.engine is ray, and Ray Train is not installed. Install it (pip install 'ray[train]'), or set "
            "run.engine: local"
        ) from error

    def loop() -> None:
        context = get_context()
        work(Group(), context.get_world_rank(), context.get_world_size())

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="WARNING")
    with tempfile.TemporaryDirectory(prefix="shardedit-train-") as folder:
        trainer = TorchTrainer(
            loop,
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=RETRIES)),
        )
        try:
            result: Any = trainer.fit()
        except Exception as error:
            raise ClusterError(
                f"the training failed on Ray: {error}. See the workers' logs, and give it again"
            ) from error
    if result.error is not None:
        raise ClusterError(f"the training failed on Ray: {result.error}. See the workers' logs, and give it again")
