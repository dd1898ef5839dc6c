"""Interleaved measurement of several candidates, and what all benchmarks share: tables, environment, memory."""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

import kd_pipeline
from kd_pipeline._core.nvidia_driver import query_driver
from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.secret_values import hide_in_arguments
from kd_pipeline._core.text import printable
from kd_pipeline.data.decode_trial import loaded_nvjpeg
from kd_pipeline.errors import MissingPackageError
from kd_pipeline.report.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Candidate",
    "Measurement",
    "environment",
    "format_table",
    "measure",
    "paired_ratio",
    "peak_memory_bytes",
    "prepare_out",
    "reset_peak_memory",
    "rotated",
    "round_up",
    "save_result",
    "spread",
    "traced",
    "wait_until_idle",
]

_PACKAGES = (
    "lightning",
    "numpy",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvimgcodec-cu13",
    "onnxruntime",
    "openvino",
    "pillow",
    "tensorrt",
    "tensorrt-rtx",
    "timm",
    "torch",
    "torchvision",
    "triton",
)
_MAX_SETTLE_S = 10.0
"""How long to wait at most for all candidates to become idle."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that processes images batch after batch."""

    name: str
    run: Callable[[int], int]
    """Processes so many more batches and returns the number of images in them."""
    num_warm_up: int | None = None
    """Of this one instead of `measure`'s, if it prefetches less than others."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one candidate, a number for each repeat."""

    name: str
    images_per_s: tuple[float, ...]
    cpu_s_per_image: tuple[float, ...]
    """CPU seconds of all threads of this process and of its `multiprocessing` workers."""
    peak_memory_bytes: tuple[int, ...]
    """Peak resident memory of this process while the candidate was timed; includes what the other candidates hold."""
    own_s_per_batch: tuple[float, ...]
    """CPU seconds of the thread that takes the batches and of `KDDataLoader`'s planning threads: Python, and what it
    calls. Sleeping does not count, waking up does."""

    @property
    def memory_growth_bytes(self) -> int:
        """Growth of the highest peak from the first half of the repeats to the second.

        Halves, because a single peak varies by a batch, depending on when DALI and torch free the last one.
        """
        half = -(-len(self.peak_memory_bytes) // 2)
        return max(self.peak_memory_bytes[-half:]) - max(self.peak_memory_bytes[:half])


class _Sample(NamedTuple):
    """One candidate in one repeat; fields in the order of `Measurement`."""

    images_per_s: float
    cpu_s_per_image: float
    peak_memory_bytes: int
    own_s_per_batch: float


def measure(
    candidates: Sequence[Candidate],
    *,
    repeats: int,
    num_batches: int,
    num_warm_up: int,
    report: Callable[[str], object],
    save: Callable[[list[Measurement]], object] = lambda rows: None,
) -> list[Measurement]:
    """Time `num_batches` batches of every candidate in every repeat, in an order that rotates from repeat to repeat.

    Only one candidate runs at a time: before each start, the process must have stopped using CPU time, so nothing is
    still being prefetched. No candidate profits from what it prefetched: `num_warm_up` untimed batches, which must be
    more than any candidate prefetches, come first. All candidates are started before the first repeat.

    Args:
        candidates: with unique names.
        repeats: how often each candidate is timed.
        num_batches: timed batches of each candidate in every repeat.
        num_warm_up: untimed batches before them.
        report: receives a line after every repeat.
        save: receives what is known after every repeat, so none is lost if a later one is cut off.
    """
    with progress_bar("warming up") as report_candidates:
        for number, candidate in enumerate(candidates):
            report_candidates(number, len(candidates))
            candidate.run(candidate.num_warm_up or num_warm_up)
    samples: dict[str, list[_Sample]] = {candidate.name: [] for candidate in candidates}
    measured: list[Measurement] = []
    for repeat in range(repeats):
        title = f"repeat {repeat + 1} of {repeats}"
        with progress_bar(title) as report_candidates:
            for number, candidate in enumerate(rotated(candidates, repeat)):
                report_candidates(number, len(candidates))
                samples[candidate.name].append(_time(candidate, num_batches, num_warm_up))
        rates = (f"{name} {own[-1].images_per_s:,.0f}" for name, own in samples.items())
        report(f"{title}, images/s: {', '.join(rates)}")
        measured = [Measurement(name, *zip(*own, strict=True)) for name, own in samples.items()]
        save(measured)
    return measured


def _time(candidate: Candidate, num_batches: int, num_warm_up: int) -> _Sample:
    wait_until_idle()
    candidate.run(candidate.num_warm_up or num_warm_up)
    reset_peak_memory()
    cpu_start_s, own_start_s, start_s = _cpu_s(), _own_cpu_s(), time.perf_counter()
    num_images = candidate.run(num_batches)
    wall_s, own_s, cpu_s = time.perf_counter() - start_s, _own_cpu_s() - own_start_s, _cpu_s() - cpu_start_s
    return _Sample(num_images / wall_s, cpu_s / num_images, peak_memory_bytes(), own_s / num_batches)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """All items in turn, beginning with number `by` (modulo their number)."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def round_up(number: int, multiple: int) -> int:
    """`number` batches, or as many more as fill whole rounds of `multiple`, which become ready together."""
    return -(-number // multiple) * multiple


def paired_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """How many times as large as `other`: the median of the ratios within each repeat.

    Other load on the machine slows down both sides of a repeat alike, so it hardly affects their ratio.
    """
    return median(mine / its for mine, its in zip(own, other, strict=True))


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """What the JSON file has for a number that was measured several times."""
    return {"median": median(samples), "min": min(samples), "max": max(samples), "repeats": samples}


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of plain text, the first column aligned left and the others right."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        aligned = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return lines


def prepare_out(out: Path | None) -> None:
    """Create the folder of the result files now, rather than fail after an hour of measuring.

    Raises:
        ConfigError: `out`, or the plot next to it, is a folder, a link or no regular file.
    """
    if out is not None:
        prepare_output(out)
        prepare_output(out.with_suffix(".png"))


def save_result(
    out: Path | None,
    to_json: Callable[[], str],
    report: Callable[[str], object],
    plot: "Callable[[], Figure] | None" = None,
) -> None:
    """Write the JSON file `out`, unless it is None, and next to it the plot as a PNG file.

    Without matplotlib there is no plot, which is reported rather than an error: the measurement may have taken hours.
    """
    if out is None:
        return
    write_output(out, to_json() + "\n")
    if plot is not None:
        try:
            save_figure(plot(), out.with_suffix(".png"))
        except (MissingPackageError, OSError) as exc:
            report(f"no plot was saved: {exc}")


def environment() -> dict[str, Any]:
    """The machine, the versions of driver and packages, the command line without secrets, and the time (UTC)."""
    cpu_models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    versions = {"kd_pipeline": kd_pipeline.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        for distribution in metadata.distributions(name=package):
            versions[package] = distribution.version
    with suppress(OSError, RuntimeError):  # there is none, or it does not work
        driver = query_driver()
        versions |= {"nvidia driver": driver.version or "unknown", "driver's newest cuda": driver.cuda}
    if torch.cuda.is_available():
        cudnn: Any = torch.backends.cudnn
        versions |= {"torch's cuda": str(torch.version.cuda), "torch's cudnn": str(cudnn.version())}
    if (nvjpeg := loaded_nvjpeg()) is not None:  # torchvision brings its own
        versions["nvjpeg in this process"] = ".".join(map(str, nvjpeg.version))
    module = getattr(sys.modules["__main__"], "__spec__", None)  # where Python was started with -m
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    return {
        "cpu": cpu_models[0] if cpu_models else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "versions": versions,
        "command": f"{program} {shlex.join(hide_in_arguments(sys.argv[1:]))}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def wait_until_idle() -> None:
    """Return once this process and its workers use no CPU time, or after a while if they always do."""
    deadline_s = time.perf_counter() + _MAX_SETTLE_S
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
    """CPU seconds that the loader's Python has used so far, in this thread and in the planning threads."""
    planning = [thread.ident for thread in threading.enumerate() if thread.name.startswith("kd_pipeline-")]
    clocks = [time.pthread_getcpuclockid(ident) for ident in planning if ident is not None]
    return time.thread_time() + sum(map(time.clock_gettime, clocks))


def _cpu_s_of(pid: int) -> float:
    # The name, in brackets, may contain anything; after it, user and system time are fields 12 and 13 (proc(5)).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset_peak_memory() -> None:
    """Make `peak_memory_bytes` count from now on."""
    # If this is refused, the peak is that of the whole run, which shows growth as well (proc(5), clear_refs).
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(process: int | str = "self") -> int:
    """Peak resident memory of a process so far; of this process, since it was reset."""
    # Not getrusage: its maximum may be that of the parent process.
    peak = next(line for line in _lines(f"/proc/{process}/status") if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024


@contextmanager
def traced(device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Profile what the GPU `device` does: the list receives the events of torch's profiler at the end."""
    events: list[dict[str, Any]] = []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        yield events
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events += json.loads(path.read_text())["traceEvents"]


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
