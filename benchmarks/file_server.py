"""Serve a folder over HTTP after a latency, with ranges, at little CPU time: `python -m benchmarks.file_server FOLDER`.

Answers GET and HEAD as S3 does too, with the bucket as the first part of the path, for clients that read nothing else.
"""

import argparse
import os
import re
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

__all__ = ["FileServer", "serving"]

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d*)-(\d*)\r\n", re.IGNORECASE)
_END = b"\r\n\r\n"
_MAX_HEADERS = 2**16


class FileServer(NamedTuple):
    """A server that runs in a process of its own."""

    url: str
    """Of the folder, without a slash at the end."""
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds that it has used so far."""
        # The name, in brackets, may contain anything; after it, user and system time are fields 12 and 13 (proc(5)).
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(folder: Path, *, latency_s: float) -> Iterator[FileServer]:
    """Serve `folder` on a free port of this machine until the end of the block."""
    command = [sys.executable, "-m", "benchmarks.file_server", str(folder), "--latency-s", str(latency_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield FileServer(f"http://127.0.0.1:{int(process.stdout.readline())}", process.pid)
        finally:
            process.kill()


class _File(NamedTuple):
    descriptor: int
    num_bytes: int
    headers: str


class _Handler(socketserver.BaseRequestHandler):
    """One client, whose requests are answered one after the other. `http.server` takes several times the CPU time."""

    request: socket.socket
    server: "_Server"

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        received = b""
        with suppress(ConnectionError):
            while data := self.request.recv(_MAX_HEADERS):
                received += data
                while _END in received:
                    head, _, received = received.partition(_END)
                    self._answer(head + b"\r\n")
                if len(received) > _MAX_HEADERS:
                    break

    def _answer(self, head: bytes) -> None:
        time.sleep(self.server.latency_s)
        method, target, _ = head.split(b" ", 2)
        try:
            file = _open(self.server.folder / unquote(target.partition(b"?")[0].decode()).lstrip("/"))
        except OSError:
            self.request.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        start, end, status = 0, file.num_bytes, "200 OK"
        if match := _RANGE.search(head):
            start, end = _asked(match, file.num_bytes)
            status = f"206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{file.num_bytes}"
        answer = f"HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\n{file.headers}\r\n".encode()
        if method == b"HEAD":
            self.request.sendall(answer)
            return
        self.request.sendall(answer, socket.MSG_MORE if end > start else 0)
        while start < end:
            start += os.sendfile(self.request.fileno(), file.descriptor, start, end - start)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, latency_s: float) -> None:
        self.folder, self.latency_s = folder, latency_s
        super().__init__(("127.0.0.1", 0), _Handler)


def _asked(match: re.Match[bytes], num_bytes: int) -> tuple[int, int]:
    """First byte and end of a range, also of one such as `-100`, the last 100 bytes."""
    first, last = match.groups()
    if not first:
        return max(0, num_bytes - int(last)), num_bytes
    return int(first), min(num_bytes, int(last) + 1) if last else num_bytes


@lru_cache(None)
def _open(path: Path) -> _File:
    descriptor = os.open(path, os.O_RDONLY)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(path)
    headers = {
        "ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"',
        "Accept-Ranges": "bytes",
        "Last-Modified": formatdate(status.st_mtime, usegmt=True),
        "Content-Type": "application/octet-stream",
    }
    return _File(descriptor, status.st_size, "".join(f"{name}: {value}\r\n" for name, value in headers.items()))


def main() -> None:
    """Print the port, and serve until standard input ends."""
    parser = argparse.ArgumentParser("python -m benchmarks.file_server", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-s", type=float, default=0.02)
    with _Server(**vars(parser.parse_args())) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()  # it ends with the process that started this one
        server.shutdown()


if __name__ == "__main__":
    main()
