"""Servers of the tests' own on this machine: what fake judges and fake editors have in common."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers whole bodies, or cut ones."""

    protocol_version = "HTTP/1.1"

    def send(
        self, status: int, body: bytes, headers: Mapping[str, str] = MappingProxyType({}), *, cut: bool = False
    ) -> None:
        """Answer; `cut`: break the connection in the middle."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut:
            self.close_connection = True
            self.connection.close()

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def served(handler: type[Handler]) -> Iterator[str]:
    """The address of a server on a free port, until the block is left."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
