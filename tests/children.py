"""Functions for child processes: some crash, hang, or report something other than they should."""

import ctypes
import os
import time

from kd_pipeline._core.child_process import open_report
from kd_pipeline.data.decode_trial import report_trial


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


def _on_windows(misbehave):
    def child(decode: str, device: str, load: str) -> None:
        misbehave() if decode == "window" else report_trial(decode, "cpu", load)

    return child


crash_on_windows, hang_on_windows, report_garbage_on_windows = map(_on_windows, (crash, hang, report_garbage))


def decode_on_the_cpu(decode: str, device: str, load: str) -> None:
    report_trial(decode, "cpu", load)
