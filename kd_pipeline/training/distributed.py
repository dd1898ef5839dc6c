"""The processes of a run under `torchrun` or SLURM: how they connect, and how many CPU threads each of them uses."""

import os
import re

import torch

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.ranks import world_size
from kd_pipeline.errors import ConfigError

__all__ = ["init_distributed", "set_num_threads"]


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
