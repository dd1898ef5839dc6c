"""What a training takes of its machine, by the counters of Linux and of fake hardware."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from kd_pipeline.training import hardware_counters
from kd_pipeline.training.hardware_counters import CpuEnergy, GpuCounters
from kd_pipeline.training.machine_use import MachineUse

RANGE = 1_000_000_000


def add_package(powercap: Path, number: int, used: int, *, name: str | None = None) -> Path:
    """A CPU package, or another domain, as Linux shows it."""
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name or f'package-{number}'}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{used}\n")
    return folder / "energy_uj"


def test_energy_of_all_packages_since_the_start(tmp_path: Path) -> None:
    first, second = add_package(tmp_path, 0, 100), add_package(tmp_path, 1, 7)
    whole = add_package(tmp_path, 2, 5, name="psys")  # of the whole machine, which includes them
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "name").write_text("package-in-name-only")
    energy = CpuEnergy(tmp_path)
    assert energy.kilojoules() == 0
    first.write_text("300000100")
    second.write_text("500000007")
    whole.write_text("900000000")
    assert energy.kilojoules() == pytest.approx(0.8)


def test_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    counter = add_package(tmp_path, 0, RANGE - 100)
    energy = CpuEnergy(tmp_path)
    counter.write_text("899899")
    assert energy.kilojoules() == pytest.approx(900_000 / 1e9)
    counter.write_text("999899")
    assert energy.kilojoules() == pytest.approx(1_000_000 / 1e9)


def test_counters_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    assert CpuEnergy(tmp_path / "missing").kilojoules() is None
    counter = add_package(tmp_path, 0, 3)
    energy = CpuEnergy(tmp_path)
    counter.unlink()
    assert energy.kilojoules() is None
    assert GpuCounters(torch.device("cpu")).kilojoules() is None and GpuCounters(torch.device("cpu")).use() is None


class FakeLibrary:
    """NVIDIA's management library with one GPU."""

    millijoules = 5_000

    def init_v2(self) -> None: ...

    def device_get_handle_by_uuid(self, uuid: str) -> int:
        assert uuid == "GPU-00000000-0000-0000-0000-000000000007"
        return 7

    def device_get_total_energy_consumption(self, handle: int) -> int:
        assert handle == 7
        return self.millijoules

    def device_get_utilization_rates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=83, memory=20)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """The library that the counters find."""
    fake = FakeLibrary()
    monkeypatch.setattr(hardware_counters, "require", lambda name, extra: fake)
    found = SimpleNamespace(uuid="00000000-0000-0000-0000-000000000007")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return fake


def test_gpu_counts_from_the_start(library: FakeLibrary) -> None:
    counters = GpuCounters(torch.device("cuda", 0))
    library.millijoules = 2_505_000
    assert counters.kilojoules() == 2.5 and counters.use() == 0.83


class NotSupportedError(Exception):
    """As the library's, which is no RuntimeError."""


def refuse(*given: object) -> NoReturn:
    raise NotSupportedError


@pytest.mark.parametrize(
    ("missing", "kilojoules", "use"),
    [
        ("device_get_total_energy_consumption", None, 0.83),
        ("device_get_utilization_rates", 0.0, None),  # as on a GPU in parts (MIG)
        ("device_get_handle_by_uuid", None, None),
        ("init_v2", None, None),
    ],
)
def test_counters_that_a_gpu_has_not_are_left_out(
    library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    kilojoules: float | None,
    use: float | None,
) -> None:
    monkeypatch.setattr(library, missing, refuse)
    counters = GpuCounters(torch.device("cuda", 0))
    assert (counters.kilojoules(), counters.use()) == (kilojoules, use)


def test_library_has_what_is_called() -> None:
    nvml = pytest.importorskip("cuda.bindings.nvml")
    names = {name for name in vars(FakeLibrary) if name.startswith(("init", "device"))}
    assert names and all(callable(getattr(nvml, name)) for name in names)
    assert hasattr(nvml.Utilization, "gpu") and issubclass(nvml.NotSupportedError, Exception)


def test_work_between_two_lines_is_counted(tmp_path: Path) -> None:
    use = MachineUse(torch.device("cpu"))
    use.compute()
    torch.rand(700, 700) @ torch.rand(700, 700)
    path = tmp_path / "read"
    path.write_bytes(os.urandom(2**20))
    found = use.compute()
    assert found["cpu_cores"] > 0 and found["host_memory_gib"] > 0.05 and found["disk_mib_per_s"] >= 0
    assert "device_use" not in found and "gpu_energy_kj" not in found
