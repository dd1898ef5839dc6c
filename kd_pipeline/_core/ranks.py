"""Which of the processes that `torchrun` or SLURM started this is, read from the environment."""

import os

__all__ = ["is_rank_zero", "local_world_size", "num_nodes", "world_size"]


def is_rank_zero() -> bool:
    """Whether this is the process that writes shared files."""
    return _read_int("RANK", "SLURM_PROCID", 0) == 0


def world_size() -> int:
    """Processes that `torchrun`, or `srun` in a SLURM job, started on all nodes; 1 without them."""
    # Not SLURM_NTASKS: a batch script has it too, although it is a single process.
    return _read_int("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def local_world_size() -> int:
    """Processes on this node; under SLURM it is known after `training.distributed.init_distributed`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_nodes() -> int:
    """Nodes of the run; known before `init_distributed` too."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return world_size() // local_world_size()
    return int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))


def _read_int(name: str, slurm_name: str, default: int) -> int:
    return int(os.environ.get(name) or os.environ.get(slurm_name) or default)
