"""Run a training program as a process of its own, and measure it from outside, the same way for every program."""

import os
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypedDict, Unpack

from kd_pipeline._core.child_process import kill_session
from kd_pipeline._core.text import printable
from kd_pipeline.errors import KDPipelineError

__all__ = ["MIN_STEPS", "ProgramOptions", "ProgramRun", "run_program", "run_untimed"]

MIN_STEPS = 4
"""Steps that a run must have at least, for one interval between the first and the last."""
_RUNNER = Path(__file__).with_name("peers_runner.py")
_STAMPS = "stamps"
_MEMORY_EVERY_S = 1.0
_NUM_LINES = 40
"""Lines of output that are kept."""
_WIDTH = 300
"""Characters of a line that are kept."""


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """What one run of a program took."""

    first_line_s: float
    """From the start of the process to the first line of output."""
    first_step_s: float
    """From the start of the process to the end of the first optimizer step."""
    intervals_s: tuple[float, ...]
    """Between the ends of consecutive optimizer steps."""
    end_s: float
    """From the last optimizer step to the end of the process."""
    peak_memory_bytes: int
    """Of the process and all its children, sampled once a second: their own memory, what they share counted once, and
    the resident libraries of the largest."""
    lines: tuple[str, ...]
    """First lines of what the program printed before its first step, such as what runs its teacher."""

    @property
    def step_s(self) -> float:
        """Median of the intervals but the first and the last.

        The last step has no teacher in it where the next batch is prepared ahead, as `KDDataLoader` does, and in the
        first interval caches and buffers are still being filled.
        """
        return median(self.intervals_s[1:-1])

    @property
    def mean_step_s(self) -> float:
        """Mean of all intervals but the last: as many runs of the teacher as of the student, in every program."""
        return sum(self.intervals_s[:-1]) / len(self.intervals_s[:-1])


class ProgramOptions(TypedDict):
    """How a program is run."""

    folder: Path
    """Existing and empty; the working directory."""
    environment: Mapping[str, str]
    """All variables of the process."""
    timeout_s: float
    """When it is killed."""


def run_program(command: Sequence[str], *, num_steps: int, **options: Unpack[ProgramOptions]) -> ProgramRun:
    """Run a Python program that takes `num_steps` optimizer steps, at least `MIN_STEPS`.

    Args:
        command: path of a Python, then a script or `-m` and a module, and their arguments.
        num_steps: how many steps it will take.
        options: as in `ProgramOptions`.

    Raises:
        KDPipelineError: it failed, was too slow, or took more or fewer steps; has the last lines of output.
    """
    watch = _run(command, **options)
    stamps = options["folder"] / _STAMPS
    steps_s = [int(line) / 1e9 for line in stamps.read_text().split()] if stamps.exists() else []
    if len(steps_s) != num_steps:
        raise KDPipelineError(f"it took {len(steps_s)} optimizer steps instead of {num_steps}: {watch.last_lines()}")
    return ProgramRun(
        first_line_s=watch.first_line_s() - watch.started_s,
        first_step_s=steps_s[0] - watch.started_s,
        intervals_s=tuple(later - earlier for earlier, later in pairwise(steps_s)),
        end_s=watch.ended_s - steps_s[-1],
        peak_memory_bytes=watch.peak_memory_bytes,
        lines=tuple(watch.lines(until_s=steps_s[0])[:_NUM_LINES]),
    )


def run_untimed(command: Sequence[str], **options: Unpack[ProgramOptions]) -> None:
    """Run a Python program that prepares something, with the same arguments.

    Raises:
        KDPipelineError: it failed or was too slow; has the last lines of output.
    """
    _run(command, **options)


def _run(command: Sequence[str], *, folder: Path, environment: Mapping[str, str], timeout_s: float) -> "_Watch":
    python, *program = command
    started_s = time.monotonic()
    with subprocess.Popen(
        [python, str(_RUNNER), str(folder / _STAMPS), *program],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        watch = _Watch(process, started_s)
        try:
            has_ended = watch.until_it_ends(started_s + timeout_s)
        finally:
            kill_session(process)  # also what it left running
    if not has_ended:
        raise KDPipelineError(f"it ran for more than {timeout_s:g} s: {watch.last_lines()}")
    if process.returncode:
        raise KDPipelineError(f"it ended with status {process.returncode}: {watch.last_lines()}")
    return watch


class _Watch:
    """Output, memory and end of a process, with the times at which they were seen."""

    def __init__(self, process: subprocess.Popen[bytes], started_s: float) -> None:
        assert process.stdout is not None
        self._process, self._output = process, process.stdout.fileno()
        self._chunks: list[tuple[float, bytes]] = []
        self._has_ended = False
        self.started_s = self.ended_s = started_s
        self.peak_memory_bytes = 0

    def until_it_ends(self, deadline_s: float) -> bool:
        """Return when the process has ended, or at the deadline; whether it has ended."""
        os.set_blocking(self._output, False)
        end = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._output, selectors.EVENT_READ)
                selector.register(end, selectors.EVENT_READ)
                while not self._has_ended and time.monotonic() < deadline_s:
                    self.peak_memory_bytes = max(self.peak_memory_bytes, _memory_bytes(self._process.pid))
                    self._until_next_sample(selector, end, min(deadline_s, time.monotonic() + _MEMORY_EVERY_S))
        finally:
            os.close(end)
        self._read()
        return self._has_ended

    def _until_next_sample(self, selector: selectors.BaseSelector, end: int, sample_s: float) -> None:
        while not self._has_ended and (left_s := sample_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                if key.fd == end:
                    self.ended_s, self._has_ended = time.monotonic(), True
                elif not self._read():
                    selector.unregister(self._output)

    def _read(self) -> bool:
        """Read what is there; whether more may come."""
        with suppress(BlockingIOError):
            while chunk := os.read(self._output, 2**16):
                self._chunks.append((time.monotonic(), chunk))
            return False
        return True

    def first_line_s(self) -> float:
        """When the first line that is not empty was complete; the end if there is none."""
        seen = b""
        for seconds, chunk in self._chunks:
            seen += chunk
            if b"\n" in seen.lstrip():
                return seconds
        return self.ended_s

    def lines(self, until_s: float) -> list[str]:
        """What was printed by then."""
        text = b"".join(chunk for seconds, chunk in self._chunks if seconds <= until_s).decode(errors="replace")
        return [printable(line)[:_WIDTH] for line in text.splitlines() if line.strip()]

    def last_lines(self) -> str:
        """The end of the output, for an error."""
        return " | ".join(self.lines(time.monotonic())[-5:]) or "it printed nothing"


def _memory_bytes(root: int) -> int:
    """Memory of a process and its descendants, in which what they share is counted once."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    pending, total, files = [root], 0, 0
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        with suppress(OSError, KeyError):
            total += sum(_kibibytes(pid, "smaps_rollup", "Pss_Anon", "Pss_Shmem"))
            # Libraries: each process has the same, and others than these may have them too, which would lower the PSS.
            files = max(files, *_kibibytes(pid, "status", "RssFile"))
    return 1024 * (total + files)


def _kibibytes(pid: int, file: str, *names: str) -> list[int]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/{file}").read_text().splitlines() if ":" in line)
    return [int(lines[name].split()[0]) for name in names]
