"""libcuda and NVML are replaced by fake libraries."""

import ctypes
from typing import Any

import pytest

from kd_pipeline._core.nvidia_driver import Driver, DriverGpu, query_driver


class Library:
    """libcuda and NVML of a machine with two GPUs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGetName(self, name: Any, length: int, index: int) -> int:
        name.value = [b"NVIDIA H100 80GB HBM3", b"NVIDIA A100-SXM4-40GB"][index]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, index: int) -> int:
        memory._obj.value = [80 << 30, 40 << 30][index]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, index: int) -> int:
        value._obj.value = {75: [9, 8], 76: [0, 0]}[attribute][index]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"system not yet initialized"
        return 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        text.value = b"580.95.05"
        return 0


def test_driver_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert query_driver() == Driver(
        version="580.95.05",
        cuda="13.1",
        gpus=(
            DriverGpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=80 << 30),
            DriverGpu(name="NVIDIA A100-SXM4-40GB", compute_capability="8.0", memory_bytes=40 << 30),
        ),
    )


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Library:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(OSError, match=r"libcuda\.so\.1"):
        query_driver()


def test_driver_error_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(Library, "cuInit", lambda self, flags: 802)
    with pytest.raises(RuntimeError, match="cuInit: system not yet initialized"):
        query_driver()


def test_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_cuda(name: str) -> Library:
        if "nvidia-ml" in name:
            raise OSError(name)
        return Library(name)

    monkeypatch.setattr(ctypes, "CDLL", only_cuda)
    assert query_driver().version is None
