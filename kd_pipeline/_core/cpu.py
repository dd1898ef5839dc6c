"""How many cores there are for this process, which DALI, a teacher on the CPU and torch share."""

import math
import os
from contextlib import suppress
from pathlib import Path

from kd_pipeline.errors import ConfigError

__all__ = ["NUM_CORES_VARIABLE", "num_cores"]

NUM_CORES_VARIABLE = "KD_PIPELINE_NUM_CORES"
"""Environment variable that sets the number of cores for each process."""
_CGROUP = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Cores that this process may keep busy.

    What `KD_PIPELINE_NUM_CORES` says; else those that the process may run on, no more than its container's quota pays
    for, and of the processes that `torchrun` has started on this machine an equal share for each. DALI, a teacher on
    the CPU and torch each get so many threads unless told otherwise: teacher and student work in turns, and DALI fills
    what they leave. `bench step` shows what that costs over the parts alone.

    Raises:
        ConfigError: the variable is no positive number.
    """
    if (told := os.environ.get(NUM_CORES_VARIABLE)) is not None:
        if not told.isdecimal() or int(told) < 1:
            raise ConfigError(f"{NUM_CORES_VARIABLE} must be a number of cores of at least 1, got {told!r}")
        return int(told)
    cores = min(len(os.sched_getaffinity(0)), _quota(_CGROUP))
    return max(1, math.floor(cores / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _quota(cgroup: Path) -> float:
    """Cores that the control group's quota pays for, rounded up; both versions of the kernel's interface are tried.

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
