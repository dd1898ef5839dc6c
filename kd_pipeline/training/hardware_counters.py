"""Counters that the hardware keeps: energy of CPUs and GPU, and how busy the GPU is; nothing where it keeps none."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_pipeline._core.optional import require

__all__ = ["CpuEnergy", "GpuCounters"]

_POWERCAP = Path("/sys/class/powercap")
"""Linux's energy counters of Intel's and AMD's CPUs, which often only root may read."""


@dataclass(slots=True)
class _Package:
    """One CPU package; its counter starts at zero again after `range_uj` microjoules, a quarter of an hour at 300 W."""

    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def update(self) -> None:
        now = int(self.path.read_text())
        self.total_uj += (now - self.last_uj) % (self.range_uj + 1)
        self.last_uj = now


class CpuEnergy:
    """What all CPU packages of the machine have taken since this was made, whoever used them."""

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._packages = [*_packages(powercap)]

    def kilojoules(self) -> float | None:
        """The energy so far; None if it cannot be read. Call it more often than the counters start at zero again."""
        if not self._packages:
            return None
        try:
            for package in self._packages:
                package.update()
        except (OSError, ValueError):
            self._packages = []
            return None
        return sum(package.total_uj for package in self._packages) / 1e9


class GpuCounters:
    """Counters of one GPU, by NVIDIA's management library (NVML), of all programs that use it."""

    def __init__(self, device: torch.device) -> None:
        """Open them; on a CPU, or where the library is missing, there are none."""
        self._nvml: Any = None
        self._handle = 0
        self._start_mj: int | None = None
        if device.type != "cuda":
            return
        with suppress(Exception):  # those of the library have no other class in common
            nvml = require("cuda.bindings.nvml", extra="cu13")
            nvml.init_v2()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = nvml.device_get_handle_by_uuid(f"GPU-{uuid}")
            self._nvml = nvml
        self._start_mj = self._millijoules()

    def kilojoules(self) -> float | None:
        """Energy since this was made; None if it is not known."""
        now_mj = self._millijoules()
        return None if now_mj is None or self._start_mj is None else (now_mj - self._start_mj) / 1e6

    def use(self) -> float | None:
        """Part of the last moments, up to a second, in which the GPU had work, from 0 to 1; None if it is not known."""
        rates = self._read("device_get_utilization_rates")
        return None if rates is None else float(rates.gpu) / 100

    def _millijoules(self) -> int | None:
        """Since the driver was loaded."""
        found: int | None = self._read("device_get_total_energy_consumption")
        return found

    def _read(self, name: str) -> Any:
        """What a function of the library returns; None if the GPU has no such counter, or is a part of one (MIG)."""
        if self._nvml is None:
            return None
        with suppress(Exception):  # as above
            return getattr(self._nvml, name)(self._handle)
        return None


def _packages(powercap: Path) -> Iterator[_Package]:
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue  # a part of a package, which counts it
        with suppress(OSError, ValueError):
            if (folder / "name").read_text().startswith("package"):
                range_uj = int((folder / "max_energy_range_uj").read_text())
                yield _Package(folder / "energy_uj", range_uj, int((folder / "energy_uj").read_text()))
