"""What this CPU is, and which precisions it computes in."""

import hashlib
import platform
from functools import cache
from pathlib import Path

__all__ = ["cpu_name", "cpu_precisions", "trains_faster_in_bf16"]

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = {
    "bf16": {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "int8": {"amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm"},
}
"""What Linux calls the instructions, of which one is enough, on x86 and ARM."""


@cache
def cpu_precisions() -> frozenset[str]:
    """`fp32`, and those of `bf16`, `fp16` and `int8` that this CPU has instructions for; others are emulated, slowly.

    PyTorch reports the instruction set that it was built for rather than this, and computes in any precision.
    """
    flags = _flags()
    return frozenset({"fp32"} | {precision for precision, enough in _FLAGS.items() if flags & enough})


@cache
def trains_faster_in_bf16() -> bool:
    """Whether a network usually takes less time in bfloat16 than in float32 on this CPU.

    A ResNet-18 took 1.5 times as long to train in bfloat16 on an Intel Xeon with AVX-512 but no matrix units (AMX),
    and about half as long with AMX, and on an AMD EPYC with AVX-512.
    """
    if "bf16" not in cpu_precisions():
        return False
    return "GenuineIntel" not in _lines("vendor_id") or "amx_bf16" in _flags()


@cache
def cpu_name() -> str:
    """The model of this CPU and a digest of its flags, by which what was measured on it is kept."""
    flags = " ".join(_lines("flags", "Features")[:1])
    model = next(iter(_lines("model name", "CPU part")), platform.machine())
    return f"{model} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _flags() -> set[str]:
    return {flag for line in _lines("flags", "Features") for flag in line.split()}


def _lines(*names: str) -> list[str]:
    """The values of all lines of one of these names, in their order."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # it is not Linux, or it hides this
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() in names]
