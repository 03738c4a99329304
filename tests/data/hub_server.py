"""A server that speaks the few endpoints of the Hugging Face Hub that a download needs, and can misbehave."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Holds `files` of one repository by path.

    Requests are noted in `requests` as (method, path, Range header, Authorization header). A path in `cut` is sent up to that
    byte, whatever the range, and then the connection breaks; one in `sent` is sent with those bytes instead of its own.
    """

    daemon_threads = True

    def __init__(self, repo_id: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo_id = repo_id
        self.files = files
        self.small = {path for path in files if path.endswith(".md")}
        self.cut: dict[str, int] = {}
        self.sent: dict[str, bytes] = {}
        self.listed: dict[str, str] = {}
        self.ranges = True
        self.requests: list[tuple[str, str, str | None, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tree(self) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = [{"type": "directory", "path": "train", "oid": "0" * 40, "size": 0}]
        for path, data in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, object] = {"type": "file", "path": self.listed.get(path, path), "size": len(data), "oid": blob}
            if path not in self.small:
                sha256 = hashlib.sha256(data).hexdigest()
                entry |= {"oid": "1" * 40, "lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}}
            entries.append(entry)
        return entries


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is not for this."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        repo = self.server.repo_id
        path = path.replace(f"/datasets/{repo}/resolve/main/", f"/datasets/{repo}/resolve/{COMMIT}/")
        if path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/main"):
            self._json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0})
        elif path == f"/api/datasets/{repo}/tree/{COMMIT}":
            self._json(self.server.tree())
        elif path.startswith(prefix := f"/datasets/{repo}/resolve/{COMMIT}/") and path[len(prefix) :] in self.server.files:
            self._file(path[len(prefix) :])
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, path: str) -> None:
        data = self.server.sent.get(path, self.server.files[path])
        begin = 0
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        end = self.server.cut.get(path, len(data))
        self.wfile.write(data[begin:end])
        if end < len(data):
            self.close_connection = True


@contextmanager
def serving(server: HubServer) -> Iterator[HubServer]:
    """The server at work in a thread of this process."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
