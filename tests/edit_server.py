"""A server that edits pictures by a script, over HTTP on this machine, and counts what it was asked."""

from __future__ import annotations

import base64
import email.parser
import email.policy
import hashlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests.loopback import Handler, served

USAGE = {"input_tokens": 30, "output_tokens": 7, "input_tokens_details": {"text_tokens": 10, "image_tokens": 20}}


@dataclass(frozen=True)
class Reply:
    """What the server does with one request."""

    picture: bytes | None = None  # of the answer; None: what was sent, with a red corner
    status: int = 200
    body: bytes | None = None  # instead of an answer
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""  # the answer names this address instead of holding the picture; "own": one of this server
    usage: Any = field(default_factory=lambda: dict(USAGE))
    seconds: float = 0.0  # before it
    cut: bool = False  # the connection breaks in the middle of the body


Script = Callable[[str, int], Reply]
"""From (prompt, number of the attempt at this picture and prompt from 0) to a reply."""


class EditServer:
    """The server's own books."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: Counter[tuple[str, str]] = Counter()  # by digest of the picture, and prompt
        self.at: list[float] = []
        self.forms: list[dict[str, str]] = []
        self.masks: list[np.ndarray] = []
        self.headers: list[dict[str, str]] = []
        self.fetched: list[dict[str, str]] = []  # headers of what was fetched by address
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, fields: dict[str, bytes], headers: dict[str, str]) -> tuple[Reply, bytes]:
        """Note what was sent, and ask the script."""
        picture, prompt = fields.pop("image"), fields["prompt"].decode()
        mask = fields.pop("mask", None)
        key = hashlib.sha256(pixels_of(picture).tobytes()).hexdigest(), prompt
        with self.lock:
            attempt = self.asked[key]
            self.asked[key] += 1
            self.at.append(time.monotonic())
            self.forms.append({name: value.decode() for name, value in fields.items()})
            self.masks += [] if mask is None else [np.asarray(Image.open(io.BytesIO(mask)))]
            self.headers.append(headers)
        return self.script(prompt, attempt), picture


def pixels_of(picture: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def encoded(pixels: np.ndarray) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def with_red_corner(picture: bytes) -> bytes:
    """The upper left quarter of a picture, red."""
    pixels = pixels_of(picture).copy()
    pixels[: pixels.shape[0] // 2, : pixels.shape[1] // 2] = (255, 0, 0)
    return encoded(pixels)


def fields_of(data: bytes, content_type: str) -> dict[str, bytes]:
    """The parts of a multipart form."""
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    message = parser.parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + data)
    return {
        str(part.get_param("name", header="content-disposition")): bytes(part.get_payload(decode=True) or b"")
        for part in message.iter_parts()
    }


@contextmanager
def edit_server(script: Script = lambda prompt, attempt: Reply()) -> Iterator[EditServer]:
    """A server on a free port, until the block is left."""
    server = EditServer(script)

    class Edits(Handler):
        def do_POST(self) -> None:
            with server.lock:
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                fields = fields_of(data, self.headers["Content-Type"])
                assert self.path == "/v1/images/edits", self.path
                reply, picture = server.reply(fields, dict(self.headers))
                time.sleep(reply.seconds)
                self.send(reply.status, answer(reply, picture), reply.headers, cut=reply.cut)
            except (ConnectionError, ValueError):  # whoever asked was killed
                pass
            finally:
                with server.lock:
                    server.in_flight -= 1

        def do_GET(self) -> None:
            server.fetched.append(dict(self.headers))
            self.send(200, base64.urlsafe_b64decode(self.path.rpartition("/")[2]))

    def answer(reply: Reply, picture: bytes) -> bytes:
        if reply.body is not None:
            return reply.body
        made = with_red_corner(picture) if reply.picture is None else reply.picture
        if reply.url:
            own = f"{server.url}/{base64.urlsafe_b64encode(made).decode()}"
            data = {"url": own if reply.url == "own" else reply.url}
        else:
            data = {"b64_json": base64.b64encode(made).decode()}
        return json.dumps({"created": 1, "data": [data], "usage": reply.usage}).encode()

    with served(Edits) as url:
        server.url = f"{url}/v1"
        yield server
