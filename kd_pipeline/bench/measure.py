"""Contenders side by side: interleaved repeats, frozen results, a table of them and a JSON file."""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import kd_pipeline
from kd_pipeline.errors import ConfigError

__all__ = [
    "BenchResult",
    "BenchRow",
    "Contender",
    "environment",
    "measure",
    "peak_memory_bytes",
    "prepare_out",
    "ratio_within_repeats",
    "reset_peak_memory",
    "spread",
    "traced",
    "wait_until_idle",
]

_PACKAGES = (
    "numpy",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "onnxruntime",
    "openvino",
    "pillow",
    "tensorrt",
    "tensorrt-rtx",
    "timm",
    "torch",
    "torchvision",
)
_SETTLE_S = 10.0
"""How long at most to wait for contenders to fall idle."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that goes through images, batch after batch."""

    name: str
    run: Callable[[int], int]
    """Goes through so many batches, on from where it stopped, and returns the number of images in them."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """What was measured of one contender, a figure for each repeat."""

    name: str
    images_per_s: tuple[float, ...]
    cpu_s_per_image: tuple[float, ...]
    """CPU seconds of this process with all its threads, and of its `multiprocessing` workers."""
    peak_memory_bytes: tuple[int, ...]
    """The largest resident memory of this process while the contender was timed; the other contenders' is in it."""
    own_s_per_batch: tuple[float, ...]
    """CPU seconds of the thread that takes the batches and of those in which `KDDataLoader` plans ahead: Python, and
    what it calls. Sleeping is not in it; what waking up costs is."""

    @property
    def memory_growth_bytes(self) -> int:
        """What the highest peak grew by from the first half of the repeats to the second.

        Of halves, because a single peak is a batch higher or lower, as DALI and torch happen to free the last one.
        """
        half = -(-len(self.peak_memory_bytes) // 2)
        return max(self.peak_memory_bytes[-half:]) - max(self.peak_memory_bytes[:half])

    def ratio(self, other: "BenchRow") -> float:
        """How many times as fast as `other`."""
        return ratio_within_repeats(self.images_per_s, other.images_per_s)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All rows, in the order of the contenders, and the circumstances."""

    rows: tuple[BenchRow, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def table(self) -> str:
        """Plain text: a line for each contender, and below what the figures are."""
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{'':{width}}  images/s  lowest  highest  times as fast  CPU ms/image  own ms/batch  memory growth MiB"
        ]
        for row in self.rows:
            lines.append(
                f"{row.name:{width}}  {median(row.images_per_s):8,.0f}  {min(row.images_per_s):6,.0f}  "
                f"{max(row.images_per_s):7,.0f}  {row.ratio(self.rows[0]):13.2f}  "
                f"{1000 * median(row.cpu_s_per_image):12.2f}  {1000 * median(row.own_s_per_batch):12.2f}  "
                f"{row.memory_growth_bytes / 2**20:17.1f}"
            )
        lines.append(
            f"Medians of {len(self.rows[0].images_per_s)} interleaved repeats on {self.environment['num_cores']} "
            f"core(s), {self.settings['device']}. Times as fast: as {self.rows[0].name}. Own: CPU time of Python, "
            "planning and handing over. Memory: this process, second half over first."
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, every repeat included."""
        rows = [
            {
                "name": row.name,
                "images_per_s": spread(row.images_per_s),
                "ratio_to_first": row.ratio(self.rows[0]),
                "cpu_s_per_image": spread(row.cpu_s_per_image),
                "peak_memory_bytes": spread(row.peak_memory_bytes),
                "memory_growth_bytes": row.memory_growth_bytes,
                "own_s_per_batch": spread(row.own_s_per_batch),
            }
            for row in self.rows
        ]
        return json.dumps({"rows": rows, "settings": self.settings, "environment": self.environment}, indent=2)


def measure(
    contenders: Sequence[Contender],
    *,
    repeats: int,
    num_batches: int,
    num_warm_up: int,
    settings: Mapping[str, Any],
    report: Callable[[str], object],
) -> BenchResult:
    """Time `num_batches` batches of every contender in every repeat, in an order that rotates from repeat to repeat.

    While one is timed the others stand still: before each start the CPU time must have stopped, so that nobody is
    still preparing something ahead. And nobody is timed on what he had prepared: `num_warm_up` batches, which must be
    more than any contender has ready, go by first. All are started before the first repeat.

    Args:
        contenders: the first is the one that the others are compared with.
        repeats: how often each is timed.
        num_batches: timed batches of each in every repeat.
        num_warm_up: batches before them that are not timed.
        settings: what the result is to say about how it was made.
        report: gets a line after every repeat.
    """
    for contender in contenders:
        contender.run(num_warm_up)
    samples: list[list[_Sample]] = [[] for _ in contenders]
    for repeat in range(repeats):
        for place in range(len(contenders)):
            number = (place + repeat) % len(contenders)
            samples[number].append(_time(contenders[number], num_batches, num_warm_up))
        rates = (f"{it.name} {own[-1].images_per_s:,.0f}" for it, own in zip(contenders, samples, strict=True))
        report(f"repeat {repeat + 1} of {repeats}, images/s: {', '.join(rates)}")
    rows = (
        BenchRow(
            contender.name,
            images_per_s=tuple(sample.images_per_s for sample in own),
            cpu_s_per_image=tuple(sample.cpu_s_per_image for sample in own),
            peak_memory_bytes=tuple(sample.peak_memory_bytes for sample in own),
            own_s_per_batch=tuple(sample.own_s_per_batch for sample in own),
        )
        for contender, own in zip(contenders, samples, strict=True)
    )
    return BenchResult(tuple(rows), settings, environment())


def ratio_within_repeats(own: Sequence[float], other: Sequence[float]) -> float:
    """How many times as large as `other`: the median of the ratios within each repeat.

    What else the machine does slows down neighbors in time alike, so it hardly touches a ratio within a repeat.
    """
    return median(mine / its for mine, its in zip(own, other, strict=True))


def prepare_out(out: Path | None) -> None:
    """Make the folder of a result file now, and not after an hour of measuring.

    Raises:
        ConfigError: `out` is a folder itself.
    """
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"out: {out} is a folder; give the name of a JSON file")
        out.parent.mkdir(parents=True, exist_ok=True)


def environment() -> dict[str, Any]:
    """The machine, the versions of what runs on it, the command, and the time (UTC)."""
    cpu_models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    versions = {"kd_pipeline": kd_pipeline.__version__, "python": platform.python_version()}
    program = Path(sys.argv[0]).name
    for package in _PACKAGES:
        for distribution in metadata.distributions(name=package):
            versions[package] = distribution.version
    return {
        "cpu": cpu_models[0] if cpu_models else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "versions": versions,
        "command": f"{'python -m kd_pipeline' if program == '__main__.py' else program} {shlex.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True, slots=True)
class _Sample:
    """One contender in one repeat."""

    images_per_s: float
    cpu_s_per_image: float
    peak_memory_bytes: int
    own_s_per_batch: float


def _time(contender: Contender, num_batches: int, num_warm_up: int) -> _Sample:
    wait_until_idle()
    contender.run(num_warm_up)
    reset_peak_memory()
    cpu_start_s, own_start_s, start_s = _cpu_s(), _own_cpu_s(), time.perf_counter()
    num_images = contender.run(num_batches)
    wall_s, own_s, cpu_s = time.perf_counter() - start_s, _own_cpu_s() - own_start_s, _cpu_s() - cpu_start_s
    return _Sample(num_images / wall_s, cpu_s / num_images, peak_memory_bytes(), own_s / num_batches)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """What a JSON file says of a figure that was measured several times."""
    return {"median": median(samples), "min": min(samples), "max": max(samples), "repeats": samples}


def wait_until_idle() -> None:
    """Return once this process and its workers use no CPU time, or after a while if they always do."""
    deadline_s = time.perf_counter() + _SETTLE_S
    while time.perf_counter() < deadline_s:
        before_s = _cpu_s()
        time.sleep(0.1)
        if _cpu_s() - before_s < 0.01:
            return


def _cpu_s() -> float:
    """CPU seconds that this process and its workers have used so far."""
    workers = (worker.pid for worker in multiprocessing.active_children())
    return time.process_time() + sum(_cpu_s_of(pid) for pid in workers if pid is not None)


def _own_cpu_s() -> float:
    """CPU seconds that the loader's Python has used so far, in this thread and in those that plan for it."""
    planning = [thread.ident for thread in threading.enumerate() if thread.name.startswith("kd_pipeline-")]
    clocks = [time.pthread_getcpuclockid(ident) for ident in planning if ident is not None]
    return time.thread_time() + sum(map(time.clock_gettime, clocks))


def _cpu_s_of(pid: int) -> float:
    # The name, in brackets, may hold anything; behind it, user and system time are the fields 12 and 13 (proc(5)).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` speak of what comes from now on."""
    # Where this is refused the peak is that of the whole run, which shows growth as well (proc(5), clear_refs).
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(process: int | str = "self") -> int:
    """The largest resident memory of a process so far, of this one since it was reset."""
    # Not getrusage: its maximum may be that of the process that started this one.
    peak = next(line for line in _lines(f"/proc/{process}/status") if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


@contextmanager
def traced(device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """What the GPU `device` does inside: a list that gets the events of torch's profiler at the end."""
    events: list[dict[str, Any]] = []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield events
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events += json.loads(path.read_text())["traceEvents"]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
