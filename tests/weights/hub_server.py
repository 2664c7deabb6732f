"""A small Hugging Face hub for tests: serves folders as repositories, with the endpoints that huggingface_hub uses.

GET /api/models/{repo}/revision/{revision}, GET /api/models/{repo}/tree/{commit}, HEAD and GET /{repo}/resolve/{revision}/{file}
with Range. Other paths are served as files of `files`, for downloads by URL.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<revision>[^/?]+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LFS_SUFFIXES = {".safetensors", ".bin", ".onnx"}


@dataclass
class HubServer:
    """State of the server. Tests change it between requests."""

    repositories: dict[str, Path] = field(default_factory=dict)
    commit: str = "a" * 40
    gated: set[str] = field(default_factory=set)
    """Repositories whose files need the token."""
    token: str = "hf_allowed"
    files: dict[str, bytes] = field(default_factory=dict)
    """Path -> content, for downloads by URL."""
    cut_after: dict[str, int] = field(default_factory=dict)
    """File -> number of bytes after which its next response ends."""
    corrupt: set[str] = field(default_factory=set)
    """Files that are sent with other content of the same size."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each request."""
    url: str = ""

    def downloads(self) -> Counter[str]:
        """Return file name -> number of GET requests."""
        return Counter(path.rsplit("/", 1)[-1] for method, path, _ in self.requests if method == "GET" and "/api/" not in path)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    state = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            state.requests.append((self.command, path, self.headers.get("Range")))
            if match := API.fullmatch(path):
                self._api(match)
            elif match := FILE.fullmatch(path):
                self._file(match)
            elif path in state.files:
                self._content(path, state.files[path], {})
            else:
                self._send(404, b"", {})

        do_HEAD = do_GET

        def _api(self, match: re.Match[str]) -> None:
            folder = state.repositories.get(match["repo"])
            if folder is None:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif match["revision"] not in ("main", state.commit):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif match["kind"] == "revision":
                names = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
                self._json({"id": match["repo"], "sha": state.commit, "siblings": names, "tags": [], "private": False})
            else:
                self._json([_entry(path, folder) for path in _files(folder)])

        def _file(self, match: re.Match[str]) -> None:
            allowed = self.headers.get("Authorization") == f"Bearer {state.token}"
            if match["repo"] in state.gated and not allowed:
                self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
                return
            folder = state.repositories.get(match["repo"])
            path = folder / match["file"] if folder else None
            if path is None or not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            content = path.read_bytes()
            entry = _entry(path, folder)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            self._content(match["file"], content, {"ETag": f'"{etag}"', "X-Repo-Commit": state.commit})

        def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
            if name in state.corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            status, start = 200, 0
            if requested := self.headers.get("Range"):
                start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1])
                status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self._send(
                status, content[start:], headers, cut_after=state.cut_after.pop(name, None) if self.command == "GET" else None
            )

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str], cut_after: int | None = None) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(content[:cut_after])
            if cut_after is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path, folder: Path) -> dict[str, object]:
    content = path.read_bytes()
    object_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(content), "oid": object_id}
    if path.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
