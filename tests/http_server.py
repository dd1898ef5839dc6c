"""A web server of a folder, in threads of this process, which keeps a log and misbehaves when it is told to."""

import email.utils
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Literal, NamedTuple

__all__ = ["Fault", "FolderServer", "Request", "serve_folder"]

Fault = int | Literal["close", "cut", "drip", "hang", "hang in body", "ignore range", "short body", "short range"]
"""A status, or what the server does instead of a right answer.

- `close`: ends the connection without an answer.
- `cut`: ends the connection after half of the body.
- `drip`: sends a byte each 50 ms.
- `hang`: answers nothing, and keeps the connection.
- `hang in body`: the same, after half of the body.
- `ignore range`: sends the whole file with status 200.
- `short body`: says that it sends the range, and that half of it is all.
- `short range`: sends half of the range, as if that were asked for.
"""


class Request(NamedTuple):
    """A line of the log; `range` is the header, such as `bytes=0-9`."""

    method: str
    path: str
    range: str | None
    headers: dict[str, str]


class FolderServer:
    """What tests see of a server. Settings hold from the next request on.

    Attributes:
        url: without a slash at its end.
        requests: the log; may be cleared.
        latency_s: wait before each answer.
        etags: sent for a path such as `/a.tar` instead of its own.
        has_etags: whether ETag and Last-Modified are sent.
        token: `Authorization: Bearer` of all requests, or they are refused; None for none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.latency_s = 0.0
        self.etags: dict[str, str] = {}
        self.has_etags = True
        self.token: str | None = None
        self.ended = Event()
        self._faults: list[tuple[Fault, str]] = []
        self._lock = Lock()
        server = _Server(("127.0.0.1", 0), partial(_Handler, self))
        self._server = server
        self.url = f"http://127.0.0.1:{server.server_port}"

    def fail(self, fault: Fault, times: int = 1, path: str = "") -> None:
        """Order a fault for the next requests, whose path has `path` in it."""
        with self._lock:
            self._faults += [(fault, path)] * times

    def recover(self) -> None:
        """Take back all faults."""
        with self._lock:
            self._faults.clear()

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for position, (fault, part) in enumerate(self._faults):
                if part in path:
                    del self._faults[position]
                    return fault
        return None

    def start(self) -> None:
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serve_folder(folder: Path) -> Iterator[FolderServer]:
    """Serve the files of `folder` on a free port of this machine."""
    server = FolderServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # of 5, more connections at once would wait for a second


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, control: FolderServer, *args: Any) -> None:
        self._control = control
        super().__init__(*args, directory=str(control.folder))

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, has_body: bool) -> None:
        control, wanted = self._control, self.headers.get("Range")
        control.requests.append(Request(self.command, self.path, wanted, dict(self.headers)))
        if control.latency_s:
            control.ended.wait(control.latency_s)
        fault = control.take_fault(self.path)
        path = Path(self.translate_path(self.path))
        if fault in ("close", "hang"):
            if fault == "hang":
                control.ended.wait()
            self.close_connection = True
        elif isinstance(fault, int):
            self._send_status(fault)
        elif control.token is not None and self.headers.get("Authorization") != f"Bearer {control.token}":
            self._send_status(401)
        elif path.is_dir():
            (super().do_GET if has_body else super().do_HEAD)()
        elif not path.is_file():
            self._send_status(404)
        else:
            self._send_file(path, None if fault == "ignore range" else wanted, fault, has_body)

    def _send_status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, path: Path, wanted: str | None, fault: Fault | None, has_body: bool) -> None:
        status = path.stat()
        start, end = 0, status.st_size
        if wanted is not None:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
            assert match is not None, wanted
            start, end = int(match[1]), min(int(match[2] or end) + 1, end)
            if start >= status.st_size:
                self._send_status(416, {"Content-Range": f"bytes */{status.st_size}"})
                return
        if fault == "short range":
            end = start + (end - start) // 2
        self.send_response(200 if wanted is None else 206)
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{status.st_size}")
        if self._control.has_etags:
            etag = self._control.etags.get(self.path, f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", email.utils.formatdate(status.st_mtime, usegmt=True))
        if fault == "short body":
            end = start + (end - start) // 2
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if has_body:
            self._send_body(path, start, end, fault)

    def _send_body(self, path: Path, start: int, end: int, fault: Fault | None) -> None:
        if fault in ("cut", "hang in body"):
            end = start + (end - start) // 2
        with path.open("rb") as file:
            if fault == "drip":
                for offset in range(start, end):
                    self.wfile.write(os.pread(file.fileno(), 1, offset))
                    if self._control.ended.wait(0.05):
                        break
            elif start < end:
                self.wfile.flush()
                self.connection.sendfile(file, start, end - start)
        if fault == "hang in body":
            self._control.ended.wait()
        if fault in ("cut", "hang in body"):
            self.close_connection = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked has given up
            super().handle()
