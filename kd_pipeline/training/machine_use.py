"""What a training takes of its machine: cores, memory, reads from disks, energy, and how busy the GPU is."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from kd_pipeline.training.hardware_counters import CpuEnergy, GpuCounters

__all__ = ["MachineUse"]

_STATM = Path("/proc/self/statm")
"""Linux's count of the pages of this process; the second number is of those in memory."""
_IO = Path("/proc/self/io")
"""Linux's counts of the bytes that this process has moved."""


class MachineUse:
    """Counts between two log lines; nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        """Count from now on, on the device of the training."""
        self._device = device
        self._cpu_s, self._wall_s, self._read_bytes = time.process_time(), time.perf_counter(), _bytes_read()
        self._cpu_energy, self._gpu = CpuEnergy(), GpuCounters(device)

    def compute(self) -> dict[str, float]:
        """By their names in logs:

        - `cpu_cores`: cores that were busy on average since the last call, of DALI and torch together.
        - `host_memory_gib`: memory that the process takes now.
        - `disk_mib_per_s`: what the process had read from disks since the last call, and not from Linux's cache.
        - `device_memory_gib`: on a GPU, memory that is taken of it, by all programs and libraries.
        - `device_use`: on a GPU, the part of the last moments in which it had work, from 0 to 1.
        - `cpu_energy_kj`, `gpu_energy_kj`: kilojoules since the start, of all CPUs of the machine and of the GPU. Only
          where counters can be read: those of CPUs often by root alone.
        """
        cpu_s, wall_s, read_bytes = time.process_time(), time.perf_counter(), _bytes_read()
        passed_s = max(wall_s - self._wall_s, 1e-9)
        found: dict[str, float | None] = {"cpu_cores": (cpu_s - self._cpu_s) / passed_s}
        with suppress(OSError, IndexError, ValueError):  # another system
            num_pages = int(_STATM.read_text().split()[1])
            found["host_memory_gib"] = num_pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        if read_bytes is not None and self._read_bytes is not None:
            found["disk_mib_per_s"] = (read_bytes - self._read_bytes) / 2**20 / passed_s
        self._cpu_s, self._wall_s, self._read_bytes = cpu_s, wall_s, read_bytes
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            found["device_memory_gib"] = (total - free) / 2**30
            found["device_use"] = self._gpu.use()
        found |= {"cpu_energy_kj": self._cpu_energy.kilojoules(), "gpu_energy_kj": self._gpu.kilojoules()}
        return {name: value for name, value in found.items() if value is not None}


def _bytes_read() -> int | None:
    """Bytes that this process had fetched from disks; None on another system."""
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(": ") for line in _IO.read_text().splitlines())
        return int(lines["read_bytes"])
    return None
