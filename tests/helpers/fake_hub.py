"""A hub on this machine: answers what huggingface_hub asks, from folders, and can be told to move.

Used in a process of its own with ``HF_ENDPOINT`` set before huggingface_hub is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["FakeHub"]


class FakeHub:
    """``commit(files)`` adds a commit of the one repo and returns it; ``main`` is where it points.

    ``asked``: the requests so far, as "METHOD path".
    """

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.commits: dict[str, dict[str, bytes]] = {}
        self.main = ""
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(json.dumps({k: v.hex() for k, v in files.items()}).encode()).hexdigest()
        self.commits[name] = files
        self.main = name
        return name

    def commit_folder(self, folder: Path) -> str:
        found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        return self.commit({name: path.read_bytes() for name, path in found.items()})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # Answering

    def _commit_of(self, revision: str) -> str | None:
        name = self.main if revision == "main" else revision
        return name if name in self.commits else None

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(f"{request.command} {path}")
        status, headers, data = self._found(path)
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)

    def _found(self, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = re.escape(self.repo)
        file = re.fullmatch(rf"/{repo}/resolve/([^/]+)/(.+)", path)
        if file:
            commit = self._commit_of(file[1])
            data = self.commits.get(commit or "", {}).get(file[2])
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if data is None:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            tag = hashlib.sha256(data).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, data
        asked = re.fullmatch(rf"/api/models/{repo}(/revision/([^/]+)|/tree/([^/]+))?", path)
        commit = self._commit_of((asked[2] or asked[3] or "main") if asked else "")
        if asked is None or commit is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        files = self.commits[commit]
        if asked[3]:
            listed: Any = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
                for name in files
            ]
        else:
            listed = {
                "id": self.repo,
                "modelId": self.repo,
                "sha": commit,
                "tags": [],
                "siblings": [{"rfilename": name} for name in files],
            }
        return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
