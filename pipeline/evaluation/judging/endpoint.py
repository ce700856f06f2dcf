"""A judge behind an endpoint that speaks OpenAI's protocol.

What may pass (a lost connection, 429, 5xx), what the row alone is to blame for, and what ends the run are told apart
here; asking again is asking.py's. All requests share one limiter: a 429 slows them all.
"""

from __future__ import annotations

import base64
import email.utils
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
from typing_extensions import override

from pipeline.evaluation.judging.asking import Answer, Judge, JudgeError, PassingError, RowFailedError, key_of
from pipeline.evaluation.judging.questions import Question
from pipeline.settings.judge import JudgeConfig

LONGEST_NAMED = 120.0  # seconds that a server may ask for
AGAIN = {408, 409, 425, 429, *range(500, 600)}
OF_THE_ROW = {400, 413, 422}
FILTERS = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
SHOWN = 300  # characters of a server's message


class Endpoint(Judge):
    """Sends single requests; may be used by many threads at once.

    Args:
        config: of the judge.
        client: for tests; None: one of our own.
        wait: sleeps some seconds, and ends early, by an exception, where the run ends.
        proven: it has answered before, so that a 400 is a question's own fault.
    """

    def __init__(
        self,
        config: JudgeConfig,
        wait: Callable[[float], None] = time.sleep,
        client: httpx.Client | None = None,
        *,
        proven: bool = False,
    ) -> None:
        self._key = key_of(config)
        self._config, self._wait = config, wait
        limits = httpx.Limits(max_connections=config.concurrency)
        self._client = client or httpx.Client(timeout=config.timeout_s, limits=limits, follow_redirects=False)
        self._lock = threading.Lock()
        self._not_before = 0.0  # by the monotonic clock: what a 429 has asked for
        self._answered = proven  # any request yet

    @override
    def answer(self, question: Question) -> Answer:
        self._hold_back()
        return self._request(question)

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _hold_back(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            self._wait(left)

    def _request(self, question: Question) -> Answer:
        config, began = self._config, time.monotonic()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            response = self._client.post(
                f"{config.base_url}/chat/completions", json=body_of(question, config), headers=headers
            )
        except httpx.TimeoutException as error:
            raise PassingError("timeout") from error
        except httpx.HTTPError as error:
            raise PassingError("connection") from error
        if response.status_code != 200:
            self._refused(response)
        try:
            data = response.json()
            choice = data["choices"][0]
            content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise PassingError("bad_body") from error
        self._answered = True
        if choice.get("finish_reason") == "content_filter":
            raise RowFailedError("content_filter")
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        refused = isinstance(refusal, str) and bool(refusal) and not _text(content)
        return Answer(
            text=refusal if refused else _text(content),
            finish_reason="refusal" if refused else str(choice.get("finish_reason") or "stop"),
            model_reported=str(data.get("model") or ""),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            latency_ms=round(1000 * (time.monotonic() - began), 1),
        )

    def _refused(self, response: httpx.Response) -> None:
        """Raise what another status than 200 means."""
        status, message, code = response.status_code, *_message(response)
        shown = self._without_key(message)[:SHOWN]
        if status == 429 and code == "insufficient_quota":
            raise JudgeError(f"the judge's quota is spent: {shown}. What is scored stays; go on once there is more")
        if any(mark in (code, message) or mark in message for mark in FILTERS):
            raise RowFailedError("content_filter")
        if status in AGAIN:
            after = _retry_after(response)
            if status == 429:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + (after or 1.0))
            raise PassingError(f"http_{status}", after)
        if status in OF_THE_ROW and (self._answered or status != 400):
            raise RowFailedError(f"http_{status}")
        raise JudgeError(
            f"the judge at {self._config.host} answers {status}: {shown}. Check judge.base_url, judge.model and the "
            f"key in {self._config.key_env}"
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key else text


def body_of(question: Question, config: JudgeConfig) -> dict[str, Any]:
    """What is sent: the text before the pictures, and no name of anything."""
    kind = "png" if config.image == "png" else "jpeg"
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(one).decode()}"}}
        for one in question.pictures
    ]
    seed = {} if config.seed is None else {"seed": config.seed + question.run}
    return {
        "model": config.model,
        "messages": [{"role": "user", "content": [{"type": "text", "text": question.text}, *pictures]}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "stream": False,
        **seed,
    }


def _text(content: Any) -> str:
    """An answer's text, which some endpoints send in parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _message(response: httpx.Response) -> tuple[str, str]:
    """What a server says of an error, and its code."""
    try:
        error = response.json().get("error")
        if isinstance(error, dict):
            return str(error.get("message") or ""), str(error.get("code") or error.get("type") or "")
        return str(error or ""), ""
    except (ValueError, AttributeError, RecursionError):
        return " ".join(response.text.split()), ""


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that a server asks us to wait, at most `LONGEST_NAMED`."""
    text = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), LONGEST_NAMED) if math.isfinite(seconds) else None
