"""A proxy before an S3 server that answers some requests with 503, cuts some bodies in the middle, or takes no more."""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

UNAVAILABLE = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
FULL = b"<Error><Code>InsufficientStorage</Code><Message>No space left on device.</Message></Error>"


@contextmanager
def faulty_proxy(
    endpoint: str,
    *,
    refuse: float = 0.0,
    cut: float = 0.0,
    seed: int = 0,
    full: Callable[[str], bool] = lambda _: False,
) -> Iterator[tuple[str, Counter[str]]]:
    """The proxy's address, and how often it did what.

    Args:
        endpoint: of the server behind it.
        refuse: share of requests that are answered 503 and not passed on.
        cut: share of GET bodies that end in the middle.
        seed: of the dice.
        full: by an object's path, whether its PUT is answered 507 and not passed on.
    """
    dice, counts, lock = random.Random(seed), Counter[str](), threading.Lock()
    behind = urlsplit(endpoint).netloc

    def happens(what: str, share: float) -> bool:
        with lock:
            hit = dice.random() < share
            counts[what] += hit
            return hit

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if happens("refused", refuse):
                self.turn_away(503, UNAVAILABLE)
                return
            if self.command == "PUT" and full(urlsplit(self.path).path):
                happens("full", 1.0)
                self.turn_away(507, FULL)
                return
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
            if self.command != "HEAD":
                headers.pop("Transfer-Encoding", None)
                headers["Content-Length"] = str(len(data))
            self.send_response_only(response.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and len(data) > 1 and happens("cut", cut):
                data = data[: len(data) // 2]
                self.close_connection = True
            self.wfile.write(data)

        def turn_away(self, status: int, why: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(why)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(why)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815  the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", counts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
