"""One way of `bench step` in a process of its own, which stands still until it is asked for steps."""

import multiprocessing
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from kd_pipeline.bench.measure import peak_memory_bytes, reset_peak_memory, traced, wait_until_idle
from kd_pipeline.bench.ways import PHASES, WAYS, Clock, Step, StepTask
from kd_pipeline.errors import KDPipelineError

__all__ = ["Isolated", "StepSample"]

_NUM_PROFILED = 3
"""Steps in which copies between host and device are counted."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """Some steps in a row."""

    images_per_s: float
    ms_per_step: float
    phases_ms: dict[str, float]
    """Of a step, by the names in `PHASES`."""
    host_bytes: int
    """Largest resident memory of the process and its workers."""
    device_bytes: int | None
    """What of the GPU's memory is gone since the process started; None on a CPU."""
    copied_bytes_per_image: float | None
    """Between host and device, either way, by torch's profiler; None on a CPU."""


class Isolated:
    """A way of doing the step, opened in a process of its own.

    So each has its own threads and its own memory, and nothing that one sets in torch touches another.
    """

    def __init__(self, letter: str, task: StepTask) -> None:
        """Start the process.

        Raises:
            KDPipelineError: this way cannot be opened on this machine.
        """
        self.letter = letter
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not as a daemon, which could not start torch's workers; it ends when this side of the pipe does.
        self._process = context.Process(target=_serve, args=(theirs, letter, task))
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def time(self, num_steps: int, *, num_warm_up: int) -> StepSample:
        """Do `num_warm_up` steps and then time `num_steps`."""
        self._connection.send((num_steps, num_warm_up))
        sample: StepSample = self._answer()
        return sample

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join(timeout=30)
            raise KDPipelineError(
                f"row {self.letter}: its process ended with status {self._process.exitcode}; with too little memory, "
                "lower --batch-size"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, letter: str, task: StepTask) -> None:
    """What runs in the process: open the way, and do steps until nobody asks any more."""
    with ExitStack() as opened:
        try:
            device = torch.device(task.device)
            free_bytes = _free_bytes(device)
            step = WAYS[letter].open(task, opened)
            step(_started(device))  # compiles, builds and starts whatever works on first use
            connection.send("ready")
            while True:
                num_steps, num_warm_up = connection.recv()
                connection.send(_time(step, device, num_steps, num_warm_up, free_bytes))
        except (EOFError, BrokenPipeError):
            return
        except KeyboardInterrupt:
            return  # the parent has heard it too
        except Exception as exc:
            # Not every exception can be pickled, and its cause is in another process anyway.
            known = isinstance(exc, KDPipelineError)
            connection.send(KDPipelineError(str(exc) if known else f"{type(exc).__name__}: {exc}"))


def _time(step: Step, device: torch.device, num_steps: int, num_warm_up: int, free_bytes: int | None) -> StepSample:
    wait_until_idle()
    for _ in range(num_warm_up):
        step(_started(device))
    reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was queued before is through
    clock = _started(device)
    num_images = sum(step(clock) for _ in range(num_steps))
    totals_s, elapsed_s = clock.totals_s(), clock.elapsed_s()
    now_free = _free_bytes(device)
    sample = StepSample(
        images_per_s=num_images / elapsed_s,
        ms_per_step=1000 * elapsed_s / num_steps,
        phases_ms={phase: 1000 * totals_s[phase] / num_steps for phase in PHASES},
        host_bytes=peak_memory_bytes() + sum(map(peak_memory_bytes, _workers())),
        device_bytes=None if free_bytes is None or now_free is None else free_bytes - now_free,
        copied_bytes_per_image=None if device.type == "cpu" else _copied_bytes_per_image(step, device),
    )
    wait_until_idle()  # so that the next one in turn has the machine to itself
    return sample


def _started(device: torch.device) -> Clock:
    clock = Clock(device)
    clock.start()
    return clock


def _workers() -> list[int]:
    return [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]


def _free_bytes(device: torch.device) -> int | None:
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _copied_bytes_per_image(step: Step, device: torch.device) -> float:
    clock, num_images = _started(device), 0
    with traced(device) as events:
        for _ in range(_NUM_PROFILED):
            num_images += step(clock)
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    over_the_bus = [copy for copy in copies if "HtoD" in copy["name"] or "DtoH" in copy["name"]]
    return float(sum(copy["args"]["bytes"] for copy in over_the_bus) / num_images)
