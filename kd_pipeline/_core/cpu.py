"""The number of CPU cores that this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

from kd_pipeline._core.ranks import local_world_size, slurm_tasks_per_node
from kd_pipeline.errors import ConfigError

__all__ = ["NUM_CORES_VARIABLE", "num_cores"]

NUM_CORES_VARIABLE = "KD_PIPELINE_NUM_CORES"
"""Environment variable that sets the number of cores per process."""
_CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may use: its CPU affinity, limited by the container's quota.

    The processes that `torchrun`, `mpirun` or `srun` starts on one machine get equal shares, unless `srun` has bound
    each of them to cores of its own. `KD_PIPELINE_NUM_CORES` overrides all of it.
    This is the default number of threads of DALI, of a teacher on the CPU and of torch. The three do not add up:
    teacher and student take turns, and DALI fills the gaps. `bench step` measures the cost.

    Raises:
        ConfigError: the variable, or one of a launcher, is not a positive integer.
    """
    if (given := os.environ.get(NUM_CORES_VARIABLE)) is not None:
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"{NUM_CORES_VARIABLE} must be a number of cores of at least 1, got {given!r}")
        return int(given)
    affinity, num_processes = len(os.sched_getaffinity(0)), local_world_size()
    own = affinity if _is_bound_by_slurm(affinity, num_processes) else affinity / num_processes
    return max(1, math.floor(min(own, _quota(_CGROUP) / num_processes)))


def _is_bound_by_slurm(affinity: int, num_processes: int) -> bool:
    """Whether SLURM has divided the cores of this node among the processes already."""
    cores_of_step = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return cores_of_step.isdecimal() and affinity < int(cores_of_step) and slurm_tasks_per_node() == num_processes


def _quota(cgroup: Path) -> float:
    """The cgroup's CPU quota in cores, rounded up, by version 2 or 1 of the kernel's interface; infinite without one.

    docs.kernel.org/admin-guide/cgroup-v2.html (`cpu.max`), docs.kernel.org/scheduler/sched-bwc.html (`cpu.cfs_*`).
    """
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    with suppress(OSError, ValueError):
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:
            return math.ceil(quota_us / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text()))
    return math.inf
