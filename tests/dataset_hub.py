"""A Hugging Face hub of the tests' own that takes datasets: one repository, on loopback, as the hub's client pushes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_planted_4711"


class DatasetHub:
    """What a test sees of the server."""

    def __init__(self, repository: str) -> None:
        self.repository = repository
        self.files: dict[str, bytes] | None = None  # of the last commit; None: there is no repository
        self.commits = 0
        self.private = False
        self.uploaded: dict[str, bytes] = {}  # large files, by digest: no part of any commit yet
        self.refuses = ""  # a step that fails: "upload" or "commit"
        self.tokens: set[str] = set()

    @property
    def head(self) -> str:
        """The commit that the repository is at."""
        return f"{self.commits:040d}"


@contextmanager
def dataset_hub(repository: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[DatasetHub]:
    """Serve a repository that does not exist yet, and let the hub's client know no other hub."""
    hub = DatasetHub(repository)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    at = "huggingface_hub.constants."
    monkeypatch.setattr(f"{at}ENDPOINT", endpoint)
    monkeypatch.setattr(f"{at}HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(f"{at}HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{at}HF_HUB_DISABLE_XET", True)  # large files go up as they did before that protocol
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: DatasetHub) -> type[BaseHTTPRequestHandler]:
    api = f"/api/datasets/{hub.repository}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._get(with_body=True)

        def do_HEAD(self) -> None:
            self._get(with_body=False)

        def _get(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            raw = f"/datasets/{hub.repository}/resolve/{hub.head}/"
            if hub.files is None:
                self._answer(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
            elif path == api:
                siblings = [{"rfilename": name} for name in hub.files]
                self._answer(200, {"id": hub.repository, "sha": hub.head, "siblings": siblings})
            elif path.startswith(raw) and (name := path.removeprefix(raw)) in hub.files:
                body = hub.files[name]
                self._send(200, body if with_body else b"", {"ETag": '"1"', "X-Repo-Commit": hub.head}, len(body))
            else:
                self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(body)
                if hub.files is None:
                    hub.files, hub.private = {".gitattributes": b""}, asked.get("visibility") == "private"
                self._answer(200, {"url": f"http://{self.headers['Host']}/datasets/{hub.repository}"})
            elif path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif path == f"{api}/preupload/main":
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("parquet") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._answer(200, {"files": modes})
            elif path == f"/datasets/{hub.repository}.git/info/lfs/objects/batch":
                at = f"http://{self.headers['Host']}/lfs/"
                objects = [
                    one | {"actions": {"upload": {"href": at + one["oid"]}}} for one in json.loads(body)["objects"]
                ]
                self._answer(200, {"transfer": "basic", "objects": objects})
            elif path == f"{api}/commit/main":
                self._commit([json.loads(line) for line in body.splitlines()])
            else:
                self._answer(404, {})

        def _commit(self, lines: list[dict[str, Any]]) -> None:
            header, *rest = lines
            if hub.refuses == "commit":
                self._answer(403, {"error": "no rights"})
                return
            if header["value"].get("parentCommit") not in (None, hub.head):
                self._answer(412, {"error": "the branch moved"})
                return
            assert hub.files is not None
            for line in rest:
                value = line["value"]
                content = hub.uploaded[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                hub.files[value["path"]] = content
            hub.commits += 1
            self._answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/datasets/{hub.repository}/commit/{hub.head}",
                    "commitOid": hub.head,
                    "success": True,
                },
            )

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hub.refuses == "upload":
                self._answer(403, {})
                return
            hub.uploaded[self.path.rpartition("/")[2]] = body
            self._answer(200, {})

        def _answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self._send(status, body, {"Content-Type": "application/json", **(headers or {})}, len(body))

        def _send(self, status: int, body: bytes, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
