"""Run one variant of `bench step` in its own process, which is idle between requests."""

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from kd_pipeline._core.child_process import spawn_context
from kd_pipeline.bench.measure import peak_memory_bytes, reset_peak_memory, traced, wait_until_idle
from kd_pipeline.bench.step_variants import ON_DALI, PHASES, VARIANTS, PhaseTimer, Step, StepTask
from kd_pipeline.data.decode import resolve_decode
from kd_pipeline.data.decode_trial import loaded_nvjpeg
from kd_pipeline.errors import KDPipelineError

__all__ = ["NUM_OPENING", "NUM_PROFILED", "StepSample", "StepWorker"]

NUM_OPENING = 2
"""Steps before the first request, in which all memory is taken."""
NUM_PROFILED = 3
"""Steps in which copies between host and device are counted."""
_POLL_S = 0.5
"""How often this side looks for a reply: seldom, as it shares the cores with what is timed."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """What was measured in some consecutive steps."""

    images_per_s: float
    ms_per_step: float
    phases_ms: dict[str, float]
    """Of one step, by the names in `PHASES`."""
    host_bytes: int
    """Peak resident memory of the process and its workers."""
    device_bytes: int | None
    """GPU memory that opening and the first steps took; None on a CPU."""
    copied_bytes_per_image: float | None
    """Between host and device in both directions, by torch's profiler; None on a CPU, and where they are not counted.
    """
    decode: str | None = None
    """How `KDDataLoader` decodes in this process, which depends on what else it has imported; None in other rows."""


class StepWorker:
    """A variant of the step, open in its own process.

    So each variant has its own threads and memory, and none affects the global state of torch for the others.
    """

    def __init__(self, letter: str, task: StepTask, *, wait: Callable[[], object] = lambda: None) -> None:
        """Start the process and open the variant.

        Args:
            letter: of the variant.
            task: the step.
            wait: called a few times a second while the process works.

        Raises:
            KDPipelineError: the variant does not work on this machine.
        """
        self.letter, self._wait = letter, wait
        context = spawn_context()
        self._connection, theirs = context.Pipe()
        # Not a daemon, which could not start torch's workers; it ends when this side of the pipe closes.
        self._process = context.Process(target=_serve, args=(theirs, letter, task))
        self._process.start()
        theirs.close()
        try:
            self.decode: str | None = self._receive()
            """As in `StepSample`."""
        except BaseException:
            self.close()
            raise

    def time(
        self, num_steps: int, *, num_warm_up: int, count_copies: bool = True, wait: Callable[[], object] = lambda: None
    ) -> StepSample:
        """Do `num_warm_up` steps, then time `num_steps`; then on a GPU count the copies in a few more.

        What is timed after copies were counted may be slower: torch's profiler leaves its hooks in the process.
        """
        self._wait = wait
        self._connection.send((num_steps, num_warm_up, count_copies))
        sample: StepSample = self._receive()
        return sample

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            while not self._connection.poll(_POLL_S):
                self._wait()
            reply = self._connection.recv()
        except EOFError:
            self._process.join(timeout=30)
            raise KDPipelineError(
                f"row {self.letter}: its process ended with status {self._process.exitcode}; if it ran out of memory, "
                "lower --batch"
            ) from None
        if isinstance(reply, Exception):
            raise reply
        return reply


def _serve(connection: Connection, letter: str, task: StepTask) -> None:
    """Open the variant, then time steps on request until the connection closes."""
    with ExitStack() as opened:
        try:
            device = torch.device(task.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the timer's events are on the current one
            free_bytes = _free_bytes(device)
            step = VARIANTS[letter].open(task, opened)
            for _ in range(NUM_OPENING):
                step(_started(device))  # compiles, builds and starts what does so on first use
            device_bytes = _taken_bytes(device, free_bytes)
            decode = _decode(device) if letter in ON_DALI else None
            connection.send(decode)
            while True:
                num_steps, num_warm_up, count_copies = connection.recv()
                sample = replace(_time(step, device, num_steps, num_warm_up, device_bytes), decode=decode)
                if count_copies and device.type == "cuda":
                    sample = replace(sample, copied_bytes_per_image=_copied_bytes_per_image(step, device))
                connection.send(sample)
        except (EOFError, BrokenPipeError, KeyboardInterrupt):  # Ctrl-C reaches the parent too
            return
        except Exception as exc:
            # Not every exception can be pickled, and its traceback would be lost anyway.
            is_ours = isinstance(exc, KDPipelineError)
            connection.send(KDPipelineError(str(exc) if is_ours else f"{type(exc).__name__}: {exc}"))


def _time(step: Step, device: torch.device, num_steps: int, num_warm_up: int, device_bytes: int | None) -> StepSample:
    wait_until_idle()
    for _ in range(num_warm_up):
        step(_started(device))
    reset_peak_memory()
    # A GPU is not waited for: meanwhile the loader would prefetch, and the teacher finish a batch, that nothing times.
    timer = _started(device)
    num_images = sum(step(timer) for _ in range(num_steps))
    totals_s, elapsed_s = timer.totals_s(), timer.elapsed_s()
    sample = StepSample(
        images_per_s=num_images / elapsed_s,
        ms_per_step=1000 * elapsed_s / num_steps,
        phases_ms={phase: 1000 * totals_s[phase] / num_steps for phase in PHASES},
        host_bytes=peak_memory_bytes() + sum(map(peak_memory_bytes, _worker_pids())),
        device_bytes=device_bytes,
        copied_bytes_per_image=None,
    )
    wait_until_idle()  # the next worker must have the machine to itself
    return sample


def _started(device: torch.device) -> PhaseTimer:
    timer = PhaseTimer(device)
    timer.start()
    return timer


def _decode(device: torch.device) -> str:
    """What `data.decode: auto` is in this process, and by which nvJPEG."""
    decoding = resolve_decode("auto", None, device_id=device.index)
    nvjpeg = loaded_nvjpeg() if device.type == "cuda" else None
    by = "" if nvjpeg is None else f", nvJPEG {'.'.join(map(str, nvjpeg.version))}"
    return f"{decoding.decode}, hw_decoder_load {decoding.hw_decoder_load:g}{by}"


def _worker_pids() -> list[int]:
    return [worker.pid for worker in multiprocessing.active_children() if worker.pid is not None]


def _free_bytes(device: torch.device) -> int | None:
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _taken_bytes(device: torch.device, free_bytes: int | None) -> int | None:
    """How much less is free than `free_bytes`; only while the other processes are idle it is this one that took it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now_free = _free_bytes(device)
    return None if free_bytes is None or now_free is None else free_bytes - now_free


def _copied_bytes_per_image(step: Step, device: torch.device) -> float:
    timer = _started(device)
    with traced(device) as events:
        num_images = sum(step(timer) for _ in range(NUM_PROFILED))
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    with_host = [copy for copy in copies if "HtoD" in copy["name"] or "DtoH" in copy["name"]]
    return float(sum(copy["args"]["bytes"] for copy in with_host) / num_images)
