"""A judge that answers from a script, over HTTP on this machine, and counts what it was asked."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.loopback import Handler, served

GOOD = {
    "sc": '{"score": [7, 8], "reasoning": "done"}',
    "pq": '{"score": [6, 9], "reasoning": "clean"}',
    "rewrite": '{"reasoning": "a hat came", "instruction": "Put a hat on."}',
    "pair": '{"reasoning": "sharper", "better": "A"}',
}


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    content: Any = None  # of the answer; None: the part's good one
    status: int = 200
    body: bytes | None = None  # instead of an answer
    headers: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None  # in place of the answer
    finish_reason: str = "stop"
    seconds: float = 0.0  # before it
    cut: bool = False  # the connection breaks in the middle of the body


Script = Callable[[str, str, int], Reply]
"""From (digest of the judged picture, or two with a colon between; part; number of the attempt from 0) to a reply."""


class FakeJudge:
    """The server's own books."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: Counter[tuple[str, str]] = Counter()
        self.at: list[tuple[float, str]] = []  # when, and which picture
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[Reply, str]:
        pictures = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        digests = [hashlib.sha256(base64.b64decode(one.partition(",")[2])).hexdigest() for one in pictures]
        part = {1: "pq", 2: "sc", 3: "pair"}[len(pictures)]
        if any(
            "Where nothing was changed, write null" in one.get("text", "") for one in body["messages"][0]["content"]
        ):
            part = "rewrite"
        digest = ":".join(digests[1:]) if part == "pair" else digests[-1]
        with self.lock:
            attempt = self.asked[digest, part]
            self.asked[digest, part] += 1
            self.at.append((time.monotonic(), digest))
            self.bodies.append(body)
            self.headers.append(headers)
        return self.script(digest, part, attempt), part


@contextmanager
def fake_judge(script: Script = lambda digest, part, attempt: Reply()) -> Iterator[FakeJudge]:
    """A server on a free port, until the block is left."""
    judge = FakeJudge(script)

    class Judging(Handler):
        def do_POST(self) -> None:
            with judge.lock:
                judge.in_flight += 1
                judge.most_in_flight = max(judge.most_in_flight, judge.in_flight)
            try:
                data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply, part = judge.reply(data, dict(self.headers))
                time.sleep(reply.seconds)
                self.answer(reply, part)
            except (ConnectionError, ValueError):  # whoever asked was killed
                pass
            finally:
                with judge.lock:
                    judge.in_flight -= 1

        def answer(self, reply: Reply, part: str) -> None:
            content = GOOD[part] if reply.content is None else reply.content
            message = {"role": "assistant", "content": content}
            if reply.refusal is not None:
                message |= {"content": None, "refusal": reply.refusal}
            answer = {
                "model": "fake-1",
                "choices": [{"message": message, "finish_reason": reply.finish_reason}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5},
            }
            body = reply.body if reply.body is not None else json.dumps(answer).encode()
            self.send(reply.status, body, reply.headers, cut=reply.cut)

    with served(Judging) as url:
        judge.url = f"{url}/v1"
        yield judge
