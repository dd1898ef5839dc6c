"""Functions for child processes: some crash, hang, or report something other than they should."""

import ctypes
import os
import time
from pathlib import Path

from kd_pipeline._core.child_process import open_report
from kd_pipeline.data.decode_trial import report_trial

TRAPS = (
    *("bz2", "copyreg", "ctypes", "functools", "heapq", "inspect", "io", "json", "linecache", "multiprocessing"),
    *("pickle", "queue", "random", "re", "select", "selectors", "signal", "socket", "struct", "subprocess", "tempfile"),
    *("threading", "tokenize", "traceback", "typing", "weakref", "zipfile"),
)
"""Modules that a child imports early."""


def write_traps(folder: Path) -> Path:
    """Put modules into `folder` that note in the returned file that they were imported, and by what."""
    marker = folder / "imported"
    for name in TRAPS:
        code = f"open({str(marker)!r}, 'a').write({name + chr(10)!r})\nraise ImportError('not the real module')\n"
        (folder / f"{name}.py").write_text(code)
    return marker


def crash(*arguments: str) -> None:
    print("so far so good", flush=True)
    ctypes.string_at(0)


def hang(*arguments: str) -> None:
    open_report().write("started\n")
    time.sleep(600)


def report_garbage(*arguments: str) -> None:
    os.write(1, b"[nvimgcodec] \xff loaded\n")
    print("{}", file=open_report())


def report_nothing(*arguments: str) -> None:
    open_report()
    print("a package prints this")


def fail(*arguments: str) -> None:
    raise SystemExit(3)


def echo(*arguments: str) -> None:
    report = open_report()
    print("not for the parent")
    print(*arguments, sep="\n", file=report)


def _on_whole_images(misbehave):
    def child(decode: str, device: str, load: str, nvjpeg: str) -> None:
        misbehave() if decode == "full" else report_trial(decode, "cpu", load, nvjpeg)

    return child


crash_on_whole_images, hang_on_whole_images, report_garbage_on_whole_images = map(
    _on_whole_images, (crash, hang, report_garbage)
)


def decode_on_the_cpu(decode: str, device: str, load: str, nvjpeg: str) -> None:
    report_trial(decode, "cpu", load, nvjpeg)
