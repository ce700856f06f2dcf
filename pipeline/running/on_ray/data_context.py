"""Ray Data's settings while a run is edited: whatever is finished becomes durable at once, and nothing is dropped."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray.data
from ray.data.context import AutoscalingConfig

from pipeline.running.on_ray.pool_watch import PoolWatch

STALLED_AFTER_S = 2 * 3600.0  # of standstill: GPU nodes may take long to come, and a first model to download


def _watch(tally: Any) -> PoolWatch:
    return PoolWatch(tally.resize.remote)


@contextmanager
def data_context(tally: Any, growing_at: float) -> Iterator[None]:
    """Ray Data's settings for our jobs; the process's own come back afterwards.

    Args:
        tally: the actor that counts.
        growing_at: units per place of a worker at which a pool grows.
    """
    watch = functools.partial(_watch, tally)
    context = ray.data.DataContext.get_current()
    ours = {
        # Bytes at which an output block closes: 1 makes every unit a block of its own as soon as it is there, and so
        # durable. At the default of 128 MiB a whole run may be one block.
        "target_max_block_size": 1,
        "max_errored_blocks": 0,  # more would drop whole units silently
        "enable_progress_bars": False,  # our own counts what is committed
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": STALLED_AFTER_S,
        "actor_init_retry_on_errors": False,
        "autoscaling_config": AutoscalingConfig(actor_pool_util_upscaling_threshold=growing_at),
        "custom_execution_callback_classes": [*context.custom_execution_callback_classes, watch],
    }
    before = {name: getattr(context, name) for name in ours}
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data.dataset")]
    levels = [logger.level for logger in loggers]
    for name, value in ours.items():
        setattr(context, name, value)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    consoles = [one for one in loggers[0].handlers if isinstance(one, logging.StreamHandler)]  # its file is none
    shown_from = [console.level for console in consoles]
    for console in consoles:  # Ray's own account of an error goes to its log alone: we say in a line what went wrong
        console.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # `max_restarts` has no named argument yet in Ray 2.60; the warning asks for one.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
            yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for console, level in zip(consoles, shown_from, strict=True):
            console.setLevel(level)
