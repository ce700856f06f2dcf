"""A Hugging Face hub of the tests' own: one repository, served on loopback from a folder, as the hub's client asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What a test sees of the server: where it is, and what was asked of it."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder, self.repository = folder, repository
        self.got: Counter[str] = Counter()  # files that were downloaded
        self.gated = False  # whether its files are for those alone who accepted its terms

    def files(self) -> dict[str, Path]:
        return {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}


@contextmanager
def hub(folder: Path, repository: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a folder as a repository, and let the hub's client know no other hub and an empty cache."""
    served = Hub(folder, repository)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    at = "huggingface_hub.constants."
    monkeypatch.setattr(f"{at}ENDPOINT", endpoint)
    monkeypatch.setattr(f"{at}HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(f"{at}HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{at}HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def _handler(served: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            files = served.files()
            api, raw = f"/api/models/{served.repository}", f"/{served.repository}/resolve/{COMMIT}/"
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith(f"{api}/tree/"):
                entries = [_entry(name, file) for name, file in files.items()]
                body = json.dumps(entries).encode()
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
                body = json.dumps({"id": served.repository, "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith(raw) and served.gated:
                self._refuse(403, "GatedRepo")
                return
            elif path.startswith(raw) and (name := path.removeprefix(raw)) in files:
                body = files[name].read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
                served.got[name] += with_body
            else:
                self._refuse(404, "RevisionNotFound" if path.startswith(api) else "RepoNotFound")
                return
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _entry(name: str, file: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
