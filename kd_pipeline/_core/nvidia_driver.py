"""Version of the NVIDIA driver and properties of its GPUs, through ctypes: no CUDA package is needed."""

import ctypes
from dataclasses import dataclass
from typing import Any

__all__ = ["Driver", "DriverGpu", "query_driver"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True)
class DriverGpu:
    """One GPU that this process may use."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver, and its GPUs in CUDA's order, which is torch's too."""

    version: str | None
    """None without NVML."""
    cuda: str
    """Newest CUDA version that it supports."""
    gpus: tuple[DriverGpu, ...]


def query_driver() -> Driver:
    """Query libcuda and NVML.

    Raises:
        OSError: there is no NVIDIA driver.
        RuntimeError: the driver does not work; the message is its own.
    """
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(function: str, *arguments: Any) -> None:
        if code := getattr(cuda, function)(*arguments):
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'').decode() or code}")

    def number(function: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        call(function, ctypes.byref(value), *arguments)
        return value.value

    call("cuInit", 0)
    gpus = []
    for index in range(number("cuDeviceGetCount")):
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        call("cuDeviceGetName", name, len(name), index)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), index)
        major, minor = (number("cuDeviceGetAttribute", attribute, index) for attribute in (_MAJOR, _MINOR))
        gpus.append(
            DriverGpu(name=name.value.decode(), compute_capability=f"{major}.{minor}", memory_bytes=memory.value)
        )
    newest = number("cuDriverGetVersion")
    return Driver(version=_driver_version(), cuda=f"{newest // 1000}.{newest % 1000 // 10}", gpus=tuple(gpus))


def _driver_version() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text))
    return None if failed else text.value.decode()
