"""The doctor on the machine of the tests, and with fake packages that misbehave as real ones do."""

import os
import sys
from pathlib import Path

import pytest
import torch

from kd_pipeline._core.nvidia_driver import Driver, DriverGpu
from kd_pipeline.data import decode
from kd_pipeline.data.decode import choose_decode
from kd_pipeline.data.decode_trial import DecodeTrial
from kd_pipeline.workflows import package_checks
from kd_pipeline.workflows.doctor import (
    Capability,
    Check,
    Gpu,
    Report,
    _capabilities,
    _check_of_trial,
    _install_command,
    _serving,
    diagnose,
)

BLOCK = """
import sys


class Without:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {blocked}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Without())
"""
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "nvidia.dali",
    "cuda",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
)
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def report() -> Report:
    return diagnose()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the module path."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def block(folder: Path, *packages: str) -> None:
    """Hide packages from every Python that starts with `folder` on its path."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(blocked=packages))


def check_of(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def capability_of(report: Report, kind: str, name: str) -> Capability:
    return next(item for item in report.capabilities if (item.kind, item.name) == (kind, name))


@pytest.mark.slow
def test_installed_versions(report: Report) -> None:
    assert report.python == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= report.num_usable_cores == len(os.sched_getaffinity(0)) <= report.num_cores
    assert report.memory_bytes > 2**28
    for name in ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime"):
        check = check_of(report, name)
        if check.status != "missing":
            assert (check.status, check.install) == ("ok", None)
            assert check.version == __import__(name).__version__


@pytest.mark.slow
def test_test_environment_is_usable(report: Report) -> None:
    assert capability_of(report, "loader", "cpu").works
    assert check_of(report, "nvidia.dali").detail == "decodes on the CPU"
    assert all(capability_of(report, "teacher", name).works for name in ("pytorch", "onnxruntime"))
    assert capability_of(report, "teacher", "openvino").works == (check_of(report, "openvino").status == "ok")
    assert capability_of(report, "command", "export").works
    assert report.is_usable


@pytest.mark.slow
def test_openvino_precisions(report: Report) -> None:
    openvino = pytest.importorskip("openvino")
    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    wanted = {name.lower() for name in found} & {"fp32", "bf16", "fp16"}
    assert set(check_of(report, "openvino").supports) == wanted


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_report_without_gpu(report: Report) -> None:
    assert report.gpus == () and report.cuda_driver is None
    assert report.checks[0].name == "NVIDIA driver" and report.checks[0].status != "ok"
    assert not any("GPU" in check.name or check.name == "torch.cuda" for check in report.checks)
    assert not capability_of(report, "teacher", "tensorrt").works
    assert capability_of(report, "setting", "backend: auto").detail.endswith("openvino runs an ONNX file")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_driver_and_torch_see_same_gpus(report: Report) -> None:
    assert [gpu.name for gpu in report.gpus] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    major, minor = torch.cuda.get_device_capability(0)
    assert report.gpus[0].compute_capability == f"{major}.{minor}"
    assert check_of(report, "torch.cuda").status == "ok"
    assert capability_of(report, "loader", "gpu").works


@pytest.mark.slow
def test_tensorrt_rtx_builds_without_gpu(report: Report) -> None:
    check = check_of(report, "tensorrt_rtx")
    if check.status == "missing":
        pytest.skip("tensorrt_rtx is not installed")
    assert check.status == "ok", check.detail
    assert {"8.6", "8.9"} <= set(check.supports) and "9.0" not in check.supports
    assert capability_of(report, "command", "build-engine").works


def test_failing_cuda_provider_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the CPU provider takes the place of the CUDA provider."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(package_checks, "CUDA_PROVIDER", "CPUExecutionProvider")
    assert "CPUExecutionProvider" in package_checks._check_onnxruntime(True)["supports"]
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: ["CPUFallback"])
    found = package_checks._check_onnxruntime(True)
    assert "CPUExecutionProvider" not in found["supports"]
    assert found["detail"].endswith("CPUExecutionProvider does not run here")
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    assert "NoneType" in package_checks._check_onnxruntime(True)["detail"]
    assert "CPUExecutionProvider" in package_checks._check_onnxruntime(False)["supports"]


def trials(**faults: str) -> list[DecodeTrial]:
    """Trials of all ways on a GPU; `window_0="black"` makes one fail."""
    return [
        DecodeTrial(
            decode=way,
            hw_decoder_load=load,
            works=f"{way}_{load:g}" not in faults,
            detail=faults.get(f"{way}_{load:g}", "all images are right"),
            nvjpeg=(13, 3),
        )
        for load in (0.0, 1.0)
        for way in ("window", "full")
    ]


GPU = Gpu(name="NVIDIA H100", compute_capability="9.0", memory_bytes=2**36, served_by=())


@pytest.fixture
def fake_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a cache of its own."""
    gpu = DriverGpu(name=GPU.name, compute_capability=GPU.compute_capability, memory_bytes=GPU.memory_bytes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(decode, "query_driver", lambda: Driver(version="580", cuda="13.0", gpus=(gpu,)))


def decoding_of(report: Report, found: list[DecodeTrial]) -> dict[tuple[str, str], Capability]:
    checks = {check.name: check for check in report.checks}
    capabilities = _capabilities(checks, [GPU], found)
    return {(item.kind, item.name): item for item in capabilities if "decode" in item.name or item.name == "gpu"}


@pytest.mark.slow
def test_auto_decode_is_reported_and_cached(report: Report, fake_driver: None) -> None:
    found = decoding_of(report, trials())
    assert found["loader", "gpu"].works
    assert found["setting", "decode: auto"].detail == (
        "takes full with hw_decoder_load 1; whole images with hw_decoder_load 1: all images are right"
    )
    assert (choose_decode(0).decode, choose_decode(0).hw_decoder_load) == ("full", 1)

    found = decoding_of(report, trials(full_1="3 of 384 images are wrong (3 of one color)"))
    assert found["loader", "gpu"].works
    assert found["setting", "decode: auto"].detail == (
        "takes window with hw_decoder_load 1; whole images with hw_decoder_load 1: 3 of 384 images are wrong (3 of one "
        "color); windows with hw_decoder_load 1: all images are right"
    )
    assert choose_decode(0).decode == "window"


@pytest.mark.slow
def test_wrong_hardware_decoder_is_reported(report: Report, fake_driver: None) -> None:
    found = decoding_of(report, trials(window_1="crashed with SIGSEGV", full_1="timed out after 60 s"))
    assert found["loader", "gpu"].works
    assert found["setting", "decode: auto"].detail == (
        "takes full with hw_decoder_load 0; whole images with hw_decoder_load 1: timed out after 60 s; windows with "
        "hw_decoder_load 1: crashed with SIGSEGV; whole images: all images are right"
    )


@pytest.mark.slow
def test_gpu_that_cannot_decode_has_no_loader(report: Report, fake_driver: None) -> None:
    found = decoding_of(
        report, trials(**dict.fromkeys(["window_0", "full_0", "window_1", "full_1"], "crashed with SIGSEGV"))
    )
    assert not found["loader", "gpu"].works and ("setting", "decode: auto") not in found
    assert "crashed with SIGSEGV" in found["loader", "gpu"].detail


@pytest.mark.slow
def test_decode_trials_are_checks(report: Report) -> None:
    checks = [_check_of_trial(trial) for trial in trials(full_1="crashed with SIGSEGV")]
    assert [(check.name, check.status) for check in checks] == [
        ("decode: window (GPU)", "ok"),
        ("decode: full (GPU)", "ok"),
        ("decode: window (GPU, hw_decoder_load 1)", "ok"),
        ("decode: full (GPU, hw_decoder_load 1)", "broken"),
    ]
    assert checks[0].version == "nvJPEG 13.3" and checks[3].detail == "crashed with SIGSEGV"


@pytest.mark.slow
def test_json_round_trip(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.slow
def test_text_is_aligned(report: Report) -> None:
    text = report.to_text()
    packages, usable = (part.splitlines() for part in text.split("\n\n")[1:])
    assert len(packages) == len(report.checks) + len(report.gpus)
    assert len(usable) == 1 + len(report.capabilities)
    column = next(line for line in packages if " torch " in line).index("torch")
    assert all(line[column - 1] == " " and line[column] != " " for line in packages)


def test_missing_packages_have_install_command(machine: Path) -> None:
    block(machine, *PACKAGES)
    report = diagnose()
    cpu = "pip install 'kd_pipeline[cpu]'" if report.cuda_driver is None else None
    wanted = {
        "torch": "pip install torch",
        "torchvision": "pip install 'kd_pipeline[timm]'",
        "timm": "pip install 'kd_pipeline[timm]'",
        "lightning": "pip install 'kd_pipeline[train]'",
        "tensorrt": "pip install 'kd_pipeline[trt]'",
        "tensorrt_rtx": "pip install 'kd_pipeline[rtx]'",
    } | dict.fromkeys(["nvidia.dali", "onnx", "onnxscript", "onnxruntime", "openvino"] if cpu else [], cpu)
    for name, line in wanted.items():
        check = check_of(report, name)
        assert (check.status, check.install) == ("missing", line)
        assert any(row.split()[:2] == ["missing", name] and row.endswith(line) for row in report.to_text().splitlines())
    assert not report.is_usable
    assert not any(item.works for item in report.capabilities)
    assert "Traceback" not in report.to_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (["nvidia.dali"], {"teacher"}),
        (["onnxruntime", "openvino"], {"loader"}),
        (["onnx"], {"loader"}),
        (["openvino"], {"loader", "teacher"}),
    ],
)
def test_usable_needs_loader_and_teacher(report: Report, missing: list[str], left: set[str]) -> None:
    """From the report of this machine, as if it lacked them: what is missing is found out in the tests around it."""
    gone = {"torch", "torchvision", "timm", "lightning", *missing}
    checks = {
        check.name: check.model_copy(update={"status": "missing", "supports": ()} if check.name in gone else {})
        for check in report.checks
    }
    capabilities = tuple(_capabilities(checks, report.gpus, []))
    found = report.model_copy(update={"checks": tuple(checks.values()), "capabilities": capabilities})
    assert {item.kind for item in found.capabilities if item.works} & {"loader", "teacher"} == left
    assert found.is_usable == (len(left) == 2)


@pytest.mark.slow
def test_broken_packages_do_not_stop_others(machine: Path) -> None:
    block(machine, "torch", "nvidia.dali", "cuda", "tensorrt", "tensorrt_rtx", "openvino")
    faults = {
        "torchvision": "raise OSError('libjpeg.so.9: cannot open shared object file')",
        "timm": "import ctypes; print('so far so good', flush=True); ctypes.string_at(0)",
        "lightning": "import time; time.sleep(600)",
        "onnx": "import sys; sys.exit(3)",
        "onnxscript": "import onnx_helper_that_is_not_there",
        "onnxruntime": "print('{}'); __version__ = '1'; get_available_providers = lambda: ['CPUExecutionProvider']",
    }
    for name, code in faults.items():
        (machine / name).mkdir()
        (machine / name / "__init__.py").write_text(code)
    report = diagnose(timeout_s=5)
    found = {name: (check_of(report, name).status, check_of(report, name).detail) for name in faults}
    assert found == {
        "torchvision": ("broken", "OSError: libjpeg.so.9: cannot open shared object file"),
        "timm": ("broken", "crashed with SIGSEGV"),
        "lightning": ("broken", "timed out after 5 s"),
        "onnx": ("broken", "exited with status 3"),
        "onnxscript": ("broken", "ModuleNotFoundError: No module named 'onnx_helper_that_is_not_there'"),
        "onnxruntime": ("ok", "CPUExecutionProvider"),
    }
    assert all(check_of(report, name).install is None for name in faults)
    assert capability_of(report, "command", "export").detail == "needs onnx (broken), onnxscript (broken)"


@pytest.mark.parametrize(
    ("name", "cuda_driver", "line"),
    [
        ("nvidia.dali", "12.8", "pip install 'kd_pipeline[cu12]'"),
        ("nvidia.dali", "13.0", "pip install 'kd_pipeline[cu13]'"),
        ("cuda.core", "12.8", "pip install 'kd_pipeline[cu12]'"),
        ("cuda.core", None, "pip install 'kd_pipeline[cu13]'"),
        ("openvino", "13.0", "pip install openvino"),
        ("timm", "12.8", "pip install 'kd_pipeline[timm]'"),
        ("NVIDIA driver", None, None),
    ],
)
def test_install_command_fits_driver(name: str, cuda_driver: str | None, line: str | None) -> None:
    assert _install_command(name, cuda_driver) == line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute_capability", "installed", "serving"),
    [
        ("9.0", {"tensorrt", "tensorrt_rtx"}, ["tensorrt"]),
        ("8.9", {"tensorrt", "tensorrt_rtx"}, ["tensorrt", "tensorrt_rtx"]),
        ("12.0", {"tensorrt_rtx"}, ["tensorrt_rtx"]),
        ("9.0", {"tensorrt_rtx"}, []),
        ("7.0", {"tensorrt", "tensorrt_rtx"}, []),
    ],
)
def test_gpu_and_tensorrt_packages(
    report: Report, compute_capability: str, installed: set[str], serving: list[str]
) -> None:
    rtx = check_of(report, "tensorrt_rtx").supports or ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
    checks = {check.name: check for check in report.checks} | {
        name: Check(
            name=name,
            status="ok" if name in installed else "missing",
            supports=rtx if name == "tensorrt_rtx" and name in installed else (),
        )
        for name in ("tensorrt", "tensorrt_rtx", "cuda.core", "nvidia.dali")
    }
    checks["cuda.core"] = Check(name="cuda.core", status="ok")
    checks["onnxruntime"] = Check(name="onnxruntime", status="ok", supports=("CPUExecutionProvider",))
    assert list(_serving(compute_capability, checks)) == serving
    gpu = Gpu(name="GPU", compute_capability=compute_capability, memory_bytes=2**34, served_by=tuple(serving))
    found = {(item.kind, item.name): item for item in _capabilities(checks, [gpu])}
    assert found["teacher", "tensorrt"].works == bool(serving)
    assert found["setting", "backend: auto"].works == bool(serving)
    remedy = "'kd_pipeline[trt]' or onnxruntime-gpu" if "tensorrt" not in installed else "onnxruntime-gpu"
    auto = "tensorrt runs" if serving else "nothing runs"
    assert f"pytorch runs a module, {auto} an ONNX file" in found["setting", "backend: auto"].detail
    assert (f"(install {remedy} in place" in found["setting", "backend: auto"].detail) != bool(serving)
    assert found["teacher", "onnxruntime"].detail.endswith("needs onnxruntime-gpu in place of onnxruntime")
    provider = Check(name="onnxruntime", status="ok", supports=("CUDAExecutionProvider", "CPUExecutionProvider"))
    with_provider = {(item.kind, item.name): item for item in _capabilities({**checks, "onnxruntime": provider}, [gpu])}
    assert with_provider["teacher", "onnxruntime"].works and with_provider["setting", "backend: auto"].works
    taken = "tensorrt" if serving else "onnxruntime"
    assert f"{taken} runs an ONNX file" in with_provider["setting", "backend: auto"].detail
    assert not found["loader", "gpu"].works and "missing" in found["loader", "gpu"].detail
