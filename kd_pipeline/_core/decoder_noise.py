"""Keeps the lines that DALI's decoders print about unreadable files off stderr: the loader reports each such file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["without_decoder_noise"]

_FILTER = r"""
import os, re, signal
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
noise = re.compile(rb"\x1b\[0;3\dm\[(?:ERROR|WARNING)\] \x1b\[0m\[\w+\] [^\n]*\n")
start, kept = b"\x1b[0;3", b""
while chunk := os.read(0, 65536):
    kept = noise.sub(b"", kept + chunk)
    last = kept[kept.rfind(b"\n") + 1:]
    held = len(last) if last[:5] == start[:len(last)] and last else 0  # it may become noise
    out, kept = kept[:len(kept) - held], kept[len(kept) - held:]
    os.write(2, out)
os.write(2, kept)
"""
"""A process of its own passes on all other lines, also the last words of a process that crashes."""
_GRACE_S = 2.0


@contextmanager
def without_decoder_noise() -> Iterator[None]:
    """Leave out, while the block runs, what nvImageCodec prints with color codes to the descriptor of stderr.

    It offers no setting to turn off its errors. What Python prints is not touched, and neither are other libraries.
    """
    stderr = sys.stderr
    try:
        direct = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    reading, writing = os.pipe()
    command = [sys.executable, "-I", "-S", "-c", _FILTER]
    try:
        process = subprocess.Popen(command, stdin=reading, stderr=direct, start_new_session=True)
    finally:
        os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    if _is_descriptor_2(stderr):
        # It stays open: loggers keep it.
        sys.stderr = open(  # noqa: SIM115
            direct, "w", encoding=stderr.encoding, errors=stderr.errors, buffering=1, closefd=False
        )
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        sys.stderr = stderr
        os.dup2(direct, 2)
        with suppress(subprocess.TimeoutExpired):  # a child that still runs has the other end
            process.wait(_GRACE_S)


def _is_descriptor_2(stream: object) -> bool:
    try:
        return bool(stream.fileno() == 2)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
