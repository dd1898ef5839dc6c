from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kd_pipeline._core import cpu_features
from kd_pipeline._core.cpu_features import cpu_name, cpu_precisions, trains_faster_in_bf16

INTEL = "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: avx512f avx512_bf16"
AMD = "vendor_id\t: AuthenticAMD\nmodel name\t: EPYC\nflags\t\t: avx512f"
ARM = "BogoMIPS\t: 2100.00\nFeatures\t: asimd asimdhp"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets what Linux says about each of two cores."""
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_features, "_CPUINFO", file)

    def write(core: str) -> None:
        forget()
        file.write_text(f"processor\t: 0\n{core}\n\nprocessor\t: 1\n{core}\n\n")

    forget()
    yield write
    forget()


def forget() -> None:
    for cached in (cpu_name, cpu_precisions, trains_faster_in_bf16):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("core", "precisions", "is_faster"),
    [
        (INTEL, {"fp32", "bf16"}, False),
        (f"{INTEL} amx_tile amx_bf16 amx_int8", {"fp32", "bf16", "int8"}, True),
        (AMD, {"fp32"}, False),
        (f"{AMD} avx512_bf16 avx512_vnni", {"fp32", "bf16", "int8"}, True),
        (ARM, {"fp32", "fp16"}, False),
        (f"{ARM} bf16 i8mm", {"fp32", "fp16", "bf16", "int8"}, True),
    ],
)
def test_precisions_of_a_cpu(cpuinfo: Callable[[str], None], core: str, precisions: set[str], is_faster: bool) -> None:
    cpuinfo(core)
    assert cpu_precisions() == precisions
    assert trains_faster_in_bf16() == is_faster


def test_hidden_cpu_has_float32(cpuinfo: Callable[[str], None]) -> None:
    assert cpu_precisions() == {"fp32"} and not trains_faster_in_bf16()


def test_name_changes_with_the_flags(cpuinfo: Callable[[str], None]) -> None:
    cpuinfo(INTEL)
    first = cpu_name()
    cpuinfo(f"{INTEL} amx_bf16")
    assert first.startswith("Xeon ") and cpu_name().startswith("Xeon ") and cpu_name() != first
