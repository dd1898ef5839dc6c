"""What a training takes of its machine: cores, memory of the process, and memory of the whole GPU."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["MachineUse"]

_STATM = Path("/proc/self/statm")
"""Linux's count of the pages of this process; the second number is of those in memory."""


class MachineUse:
    """Counts between two log lines; nothing waits for the device."""

    def __init__(self) -> None:
        self._cpu_s, self._wall_s = time.process_time(), time.perf_counter()

    def compute(self, device: torch.device) -> dict[str, float]:
        """By their names in logs, of this process:

        - `cpu_cores`: cores that were busy on average since the last call, of DALI and torch together.
        - `host_memory_gib`: memory that the process takes now.
        - `device_memory_gib`: on a GPU, memory that is taken of it, by all programs and libraries.
        """
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        found = {"cpu_cores": (cpu_s - self._cpu_s) / max(wall_s - self._wall_s, 1e-9)}
        self._cpu_s, self._wall_s = cpu_s, wall_s
        with suppress(OSError, IndexError, ValueError):  # another system
            num_pages = int(_STATM.read_text().split()[1])
            found["host_memory_gib"] = num_pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            found["device_memory_gib"] = (total - free) / 2**30
        return found
