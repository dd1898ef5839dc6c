"""The processes of a run under `torchrun` or SLURM: how they connect, and how many CPU threads each of them uses."""

import os
import re
from collections.abc import Callable

import torch

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.ranks import is_rank_zero, world_size
from kd_pipeline.errors import ConfigError, StateError

__all__ = ["init_distributed", "is_restart", "on_rank_zero", "set_num_threads"]


def init_distributed() -> None:
    """Initialize the default process group if there are several processes and none is initialized yet.

    Call it before the loader is opened, which asks for its shard. Under `srun` it also sets the environment variables
    of `torchrun`, so the rest of the program need not know about SLURM.

    Raises:
        ConfigError: SLURM started a different number of processes on each node.
    """
    if world_size() > 1 and not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(_torchrun_environment())
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def on_rank_zero(function: Callable[[], object]) -> None:
    """Call `function` on rank zero, while the other ranks wait for it; call it on all ranks.

    Without it, an error of rank zero would leave the others waiting in their next collective.

    Raises:
        StateError: on the other ranks, what `function` raised on rank zero.
    """
    error: Exception | None = None
    if is_rank_zero():
        try:
            function()
        except Exception as exc:
            error = exc
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        message = [None if error is None else str(error) or type(error).__name__]
        torch.distributed.broadcast_object_list(message, src=0)
        if error is None and message[0] is not None:
            raise StateError(f"rank 0 failed: {message[0]}")
    if error is not None:
        raise error


def is_restart() -> bool:
    """Whether `torchrun` or SLURM started the same command again by itself, after a failure or a preemption."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def set_num_threads(num_threads: int | None) -> None:
    """Set torch's CPU threads. None means `OMP_NUM_THREADS` if it is set, or else the cores of this process."""
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads or num_cores())


def _torchrun_environment() -> dict[str, str]:
    """The variables that `torchrun` would set, from those of a SLURM step."""
    slurm = os.environ
    counts = slurm["SLURM_STEP_TASKS_PER_NODE"]  # such as 4(x2), or 4(x2),3
    if not re.fullmatch(r"\d+(\(x\d+\))?", counts):
        raise ConfigError(
            f"SLURM started {counts} processes per node, and a run needs the same number on each node; set "
            "srun --ntasks-per-node"
        )
    environment = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": counts.partition("(")[0],
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "MASTER_ADDR": _first_host(slurm["SLURM_STEP_NODELIST"]),
        # The same for all processes of a job, and different for different jobs.
        "MASTER_PORT": str(15_000 + int(slurm["SLURM_JOB_ID"]) % 5_000),
    }
    return environment | {name: slurm[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in slurm}


def _first_host(hosts: str) -> str:
    """`node01` of `node[01-04,7],other`."""
    return re.sub(r"\[(\w+).*", r"\1", hosts.split(",")[0])
