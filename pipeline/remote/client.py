"""The HTTP client of all servers that speak OpenAI's protocol.

What may pass (a lost connection, 429, 5xx), what the question alone is to blame for, and what ends the run are told
apart here; asking again is tries.py's. All requests share one limiter: a 429 slows them all.
"""

from __future__ import annotations

import email.utils
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import httpx2 as httpx

from pipeline.remote.server import Server
from pipeline.remote.tries import PassingError, RowFailedError, is_filtered

LONGEST_NAMED = 120.0  # seconds that a server may ask for
AGAIN = {408, 409, 425, 429, *range(500, 600)}
OF_THE_ROW = {400, 413, 422}
SHOWN = 300  # characters of a server's message
MOST_BYTES = 256 * 2**20  # of a reply


class Reply(NamedTuple):
    """What came back."""

    status: int
    content: bytes
    after: float | None  # seconds that the server asks us to wait


class Client:
    """Sends single requests; may be used by many threads at once.

    Args:
        server: whom to ask.
        wait: sleeps some seconds, and ends early, by an exception, where the run ends.
        proven: it has answered before, so that a 400 is a question's own fault.
    """

    def __init__(self, server: Server, wait: Callable[[float], None] = time.sleep, *, proven: bool = False) -> None:
        self._server, self._wait = server, wait
        limits = httpx.Limits(max_connections=server.concurrency)
        # No redirect takes the key along.
        self._client = httpx.Client(timeout=server.timeout_s, limits=limits, follow_redirects=False)
        self._lock = threading.Lock()
        self._not_before = 0.0  # by the monotonic clock: what a 429 has asked for
        self._answered = proven  # any request yet

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """What a server answers, an object of JSON.

        Args:
            path: below its address.
            body: as httpx takes it: json, or data and files.

        Raises:
            PassingError: nothing, this time.
            RowFailedError: nothing to this question.
            ServerError: nothing to any.
        """
        self._hold_back()
        server = self._server
        headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
        reply = self._sent("POST", f"{server.base_url}{path}", headers=headers, **body)
        if reply.status != 200:
            self._refused(reply)
        try:
            data = json.loads(reply.content)
        except (ValueError, RecursionError) as error:
            raise PassingError("bad_body") from error
        if not isinstance(data, dict):
            raise PassingError("bad_body")
        self._answered = True
        return data

    def get(self, url: str) -> bytes:
        """What lies at an address that the server has named; the key is not sent there.

        Raises:
            PassingError: nothing, this time.
            RowFailedError: nothing.
        """
        reply = self._sent("GET", url)
        if reply.status == 200:
            return reply.content
        if reply.status in AGAIN:
            raise PassingError(f"http_{reply.status}", reply.after)
        raise RowFailedError(f"http_{reply.status}")

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _sent(self, method: str, url: str, **body: Any) -> Reply:
        """A whole reply. Time and size of all of it are limited: a server may send a byte a minute, for ever."""
        until, content = time.monotonic() + self._server.timeout_s, bytearray()
        try:
            with self._client.stream(method, url, **body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > until:
                        raise PassingError("timeout")
                    if len(content) > MOST_BYTES:
                        raise RowFailedError("too_large")
        except httpx.TimeoutException as error:
            raise PassingError("timeout") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PassingError("connection") from error
        return Reply(response.status_code, bytes(content), _seconds(response.headers.get("Retry-After", "")))

    def _hold_back(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            self._wait(left)

    def _refused(self, reply: Reply) -> NoReturn:
        """Raise what another status than 200 means."""
        server = self._server
        status, (message, code) = reply.status, message_of(reply.content)
        shown = self._without_key(message)[:SHOWN]
        if status == 429 and code == "insufficient_quota":
            raise server.error(
                f"the {server.section}'s quota is spent: {shown}. What is done stays; go on once there is more"
            )
        if is_filtered(code, message):
            raise RowFailedError("content_filter")
        if status in AGAIN:
            if status == 429:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + (reply.after or 1.0))
            raise PassingError(f"http_{status}", reply.after)
        if status in OF_THE_ROW and (self._answered or status != 400):
            raise RowFailedError(f"http_{status}")
        raise server.error(
            f"the {server.section} at {server.host} answers {status}: {shown}. Check {server.section}.base_url, "
            f"{server.section}.model and the key in {server.key_env}"
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._server.key, "(key)") if self._server.key else text


def message_of(content: bytes) -> tuple[str, str]:
    """What a server says of an error, and its code."""
    try:
        error = json.loads(content).get("error")
        if isinstance(error, dict):
            return str(error.get("message") or ""), str(error.get("code") or error.get("type") or "")
        return str(error or ""), ""
    except (ValueError, AttributeError, RecursionError):
        return " ".join(content.decode("utf-8", "replace").split()), ""


def _seconds(named: str) -> float | None:
    """Seconds that a server asks us to wait by its Retry-After, at most `LONGEST_NAMED`; None: it names none."""
    text = named.strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), LONGEST_NAMED) if math.isfinite(seconds) else None
