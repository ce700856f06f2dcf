"""A proxy before an S3 server: refuses requests, cuts bodies, loses answers, takes no more, or passes on late.

Signatures stay valid: what is passed on is not changed.
"""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

UNAVAILABLE = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
FULL = b"<Error><Code>InsufficientStorage</Code><Message>No space left on device.</Message></Error>"

Fate = Literal["passed on", "refused", "reset", "cut", "lost", "full", "late"]
"""What happens to a request.

"refused" is answered 503 and "full" 507, "reset" not at all: none of these is passed on. "cut" is passed on, and its
answer ends in the middle; "lost": its answer never comes; "late": it is passed on after a while.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks."""

    number: int  # from 1
    method: str
    path: str  # "/bucket/key"


def dice(refuse: float = 0.0, cut: float = 0.0, seed: int = 0) -> Callable[[Request], Fate]:
    """Refuse so large a share of all requests, and cut so many of the answers to GET."""
    drawn = random.Random(seed)

    def fate(request: Request) -> Fate:
        if drawn.random() < refuse:
            return "refused"
        return "cut" if request.method == "GET" and drawn.random() < cut else "passed on"

    return fate


def full_where(is_full: Callable[[str], bool]) -> Callable[[Request], Fate]:
    """No room for objects, by their path."""
    return lambda request: "full" if request.method == "PUT" and is_full(request.path) else "passed on"


@contextmanager
def faulty_proxy(
    endpoint: str, fate: Callable[[Request], Fate], late: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[tuple[str, Counter[str]]]:
    """The proxy's address, and how many requests met which fate.

    Args:
        endpoint: of the server behind it.
        fate: decides; called for one request at a time.
        late: a block within which late requests are passed on: entering it waits.
    """
    counts, lock = Counter[str](), threading.Lock()
    behind = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                meets = fate(Request(counts.total() + 1, self.command, urlsplit(self.path).path))
                counts[meets] += 1
            if meets in ("refused", "full"):
                self.turn_away(*((503, UNAVAILABLE) if meets == "refused" else (507, FULL)))
            elif meets == "reset":
                self.close_connection = True
            else:
                with late() if meets == "late" else nullcontext():
                    self.pass_on(body, meets)

        def pass_on(self, body: bytes, meets: Fate) -> None:
            connection = http.client.HTTPConnection(behind, timeout=60)
            try:
                # With the Host that the client signed.
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                data = response.read()
                headers = dict(response.getheaders())
            finally:
                connection.close()
            self.close_connection = self.close_connection or meets in ("cut", "lost")
            if meets == "lost" or (meets == "cut" and len(data) < 2):
                return
            if self.command != "HEAD":
                headers.pop("Transfer-Encoding", None)
                headers["Content-Length"] = str(len(data))
            self.send_response_only(response.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if meets == "cut" else data)

        def turn_away(self, status: int, why: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(why)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(why)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815  the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed leaves broken connections behind: no news."""
