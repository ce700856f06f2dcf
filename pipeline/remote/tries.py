"""Requests that are made again where that may help, with growing waits between them, or those that a server names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

T = TypeVar("T")
FILTERS = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation", "moderation_blocked")
LONGEST = 60.0  # seconds between two requests, where the server names none


class RowFailedError(Exception):
    """A question that gets no answer; its text is the class."""


class PassingError(Exception):
    """What may be better the next time; its text is the class. `after`: seconds that the server asks us to wait."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def retried(
    attempt: Callable[[], T],
    *,
    tries: int,
    sleep: Callable[[float], None],
    may_help: Callable[[BaseException], bool] = lambda error: isinstance(error, PassingError),
) -> T:
    """What an attempt returns, made so many times at most; raises what the last one raised.

    Args:
        attempt: one request.
        tries: of it, at most.
        sleep: waits some seconds.
        may_help: whether an error is a reason to try again. After any but `PassingError` that is done at once.
    """
    retrying = Retrying(
        stop=stop_after_attempt(tries), wait=_wait, retry=retry_if_exception(may_help), sleep=sleep, reraise=True
    )
    return retrying(attempt)


growing = wait_random_exponential(multiplier=1, max=LONGEST)
"""Up to 1, 2, 4... seconds, at random, so that those who were refused together do not come back together."""


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, PassingError):
        return 0.0
    return growing(state) if error.after is None else error.after


def is_filtered(code: str, message: str) -> bool:
    """Whether a server's error is the verdict of its filter."""
    return any(mark in (code, message) or mark in message for mark in FILTERS)
