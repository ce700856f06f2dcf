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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if reply.cut else body)
            self.wfile.flush()
            if reply.cut:
                self.close_connection = True
                self.connection.close()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
