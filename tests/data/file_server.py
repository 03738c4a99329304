"""A server of plain files that misbehaves as told."""

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

Fault = str | int
"""What a request gets instead of the file: a status, 'cut' (the connection breaks), 'short', 'long', 'wrong' (bytes), 'stall',
'drip' (a byte at a time, for ever), or the URL it is sent on to."""


class FileServer(ThreadingHTTPServer):
    """Serves `files` by path, without ranges.

    `faults` has for each path what its next requests get; the last of them is repeated where the path is in `always`.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.faults: dict[str, list[Fault]] = {}
        self.always: set[str] = set()
        self.requests: Counter[str] = Counter()
        self.closed = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, path: str) -> Fault | None:
        faults = self.faults.get(path)
        if not faults:
            return None
        return faults[0] if path in self.always and len(faults) == 1 else faults.pop(0)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients that hang up are part of the tests."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests' output is not for this."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        self.server.requests[path] += 1
        fault, data = self.server.next_fault(path), self.server.files.get(path)
        if isinstance(fault, int) or data is None:
            self._head(fault if isinstance(fault, int) else 404, 0)
        elif fault is None:
            self._send(data)
        elif fault == "short":
            self._send(data[:-1])
        elif fault == "long":
            self._send(data + b"!")
        elif fault == "wrong":
            self._send(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        elif fault in ("cut", "stall", "drip"):
            self._head(200, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.closed.wait(60)
            while fault == "drip" and not self.server.closed.is_set():
                self.wfile.write(b"!")
                time.sleep(0.01)
            self.close_connection = True
        else:
            self._head(302, 0, fault)

    def _send(self, data: bytes) -> None:
        self._head(200, len(data))
        self.wfile.write(data)

    def _head(self, status: int, size: int, location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        if location:
            self.send_header("Location", location)
        self.end_headers()
