"""This process among those of a run: how many there are, which one it is, and how many cores are torch's."""

import os
import re

import torch

from kd_pipeline._core.cpu import num_cores
from kd_pipeline.errors import ConfigError

__all__ = ["is_first", "join_processes", "num_machines", "num_processes", "num_processes_here", "use_cores"]


def is_first() -> bool:
    """Whether this is the process that writes what all share."""
    return _number("RANK", "SLURM_PROCID", 0) == 0


def num_processes() -> int:
    """Processes that `torchrun`, or `srun` in a job of SLURM, has started, on all machines; 1 without it."""
    # Not SLURM_NTASKS, which a batch script has too, though it is one process.
    return _number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def join_processes() -> None:
    """Meet the other processes that were started, before the loader asks which shard is ours.

    What `torchrun` puts into the environment is put there for `srun` too, so that the rest need not know of SLURM.

    Raises:
        ConfigError: SLURM has started another number of processes on one machine than on another.
    """
    if num_processes() > 1 and not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(_slurm_step())
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def num_processes_here() -> int:
    """Those on this machine; known once they have been joined."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_machines() -> int:
    """Machines that the processes are on, joined or not."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return num_processes() // num_processes_here()
    return int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))


def use_cores(num_threads: int | None) -> None:
    """Give torch so many CPU threads, or where None the cores of this process, unless `OMP_NUM_THREADS` is set."""
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads or num_cores())


def _number(name: str, in_slurm: str, otherwise: int) -> int:
    return int(os.environ.get(name) or os.environ.get(in_slurm) or otherwise)


def _slurm_step() -> dict[str, str]:
    """A step of a SLURM job in the words of `torchrun`."""
    slurm = os.environ
    counts = slurm["SLURM_STEP_TASKS_PER_NODE"]  # such as 4(x2), or 4(x2),3
    if not re.fullmatch(r"\d+(\(x\d+\))?", counts):
        raise ConfigError(
            f"SLURM has started {counts} processes on the machines of this job, and a run needs as many on each; give "
            "srun --ntasks-per-node"
        )
    words = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": counts.partition("(")[0],
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "MASTER_ADDR": _first_host(slurm["SLURM_STEP_NODELIST"]),
        # The same in all of the step, and another one in another job.
        "MASTER_PORT": str(15_000 + int(slurm["SLURM_JOB_ID"]) % 5_000),
    }
    return words | {name: slurm[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in slurm}


def _first_host(hosts: str) -> str:
    """`node01` of `node[01-04,7],other`."""
    return re.sub(r"\[(\w+).*", r"\1", hosts.split(",")[0])
