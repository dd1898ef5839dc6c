"""What this machine has, what works on it, and what to install."""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from typing import TYPE_CHECKING, Literal

from kd_pipeline._core.settings import Settings
from kd_pipeline._core.text import printable
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.tensorrt.package import LOWEST_CAPABILITY
from kd_pipeline.workflows.package_checks import CUDA_PROVIDER, DRIVER, PACKAGES, run_checks

if TYPE_CHECKING:
    # At run time inside functions: it needs NumPy, Pillow and torch, and the doctor must run where one is broken.
    from kd_pipeline.data.decode_trial import DecodeTrial

__all__ = ["Capability", "Check", "Gpu", "Report", "diagnose"]

_GIB = 2**30
_HW_DECODER_LOADS = (0.0, 1.0)
"""Values of `hw_decoder_load` to try: those with which an image does not depend on its batch."""
_EXTRAS = {"lightning": "train", "timm": "timm", "torchvision": "timm", "tensorrt": "trt", "tensorrt_rtx": "rtx"}
"""The extra that installs a package; the others are in `cpu`, `cu12` and `cu13`."""

_Kind = Literal["loader", "teacher", "command", "setting"]


class Check(Settings):
    """The result of importing one package and trying it out."""

    name: str
    status: Literal["ok", "missing", "broken"]
    version: str | None = None
    detail: str = ""
    """What it can do here, or its own error message."""
    supports: tuple[str, ...] = ()
    """Precisions of OpenVINO, providers of ONNX Runtime, compute capabilities that TensorRT-RTX builds for."""
    install: str | None = None
    """The command that installs it, if it is missing."""


class Gpu(Settings):
    """One GPU that this process may use."""

    name: str
    compute_capability: str
    memory_bytes: int
    served_by: tuple[str, ...]
    """Which of `tensorrt` and `tensorrt_rtx` work here and support it."""

    def __str__(self) -> str:
        engines = " and ".join(self.served_by) or "no installed TensorRT"
        return f"{self.name}, {self.memory_bytes / _GIB:.1f} GiB; supported by {engines}"


class Capability(Settings):
    """Something that the library can or cannot do here."""

    kind: _Kind
    name: str
    works: bool
    detail: str
    """What is missing, or what it means."""


class Report(Settings):
    """The full report; `model_dump_json()` is for bug reports, `to_text()` for people."""

    kd_pipeline: str
    python: str
    platform: str
    num_cores: int
    num_usable_cores: int
    """Cores that this process may run on."""
    memory_bytes: int
    cuda_driver: str | None
    """Newest CUDA version that the driver supports; None without a working driver."""
    gpus: tuple[Gpu, ...]
    checks: tuple[Check, ...]
    """The NVIDIA driver, then the packages, then the ways to decode on the first GPU."""
    capabilities: tuple[Capability, ...]

    @property
    def is_usable(self) -> bool:
        """Whether a loader and at least one teacher backend work."""
        return {"loader", "teacher"} <= {each.kind for each in self.capabilities if each.works}

    def to_text(self) -> str:
        """Aligned lines for a terminal: the machine, the packages, and what is usable."""
        gpus = [("ok", f"GPU {number}", gpu.compute_capability, str(gpu)) for number, gpu in enumerate(self.gpus)]
        checks = [
            (check.status, check.name, check.version or "", "; ".join(filter(None, (check.detail, check.install))))
            for check in self.checks
        ]
        usable = [("yes" if each.works else "no", each.kind, each.name, each.detail) for each in self.capabilities]
        lines = [
            f"kd_pipeline {self.kd_pipeline}, Python {self.python}, {self.platform}",
            f"{self.num_usable_cores} of {self.num_cores} cores, {self.memory_bytes / _GIB:.1f} GiB of memory",
        ]
        lines += ["", *_aligned([*checks[:1], *gpus, *checks[1:]]), "", "usable", *_aligned(usable)]
        return "\n".join(lines)


def diagnose(*, timeout_s: float = 60.0) -> Report:
    """Import every package that the library can use, try each of them out, and report what works.

    The checks run in child processes, so a package that crashes or hangs is reported like one that raises.

    Args:
        timeout_s: seconds after which a package counts as hanging.
    """
    (driver,) = run_checks([DRIVER], has_gpu=False, timeout_s=timeout_s)
    cuda_driver, found_gpus = driver.pop("cuda", None), driver.pop("gpus", [])
    has_gpu = bool(found_gpus)
    groups = [[name for name in group if has_gpu or name != "torch.cuda"] for group in PACKAGES]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda names: list(run_checks(names, has_gpu=has_gpu, timeout_s=timeout_s)), groups)
        checks = {
            fields["name"]: Check(
                **fields,
                install=_install_command(fields["name"], cuda_driver) if fields["status"] == "missing" else None,
            )
            for fields in [driver, *chain.from_iterable(results)]
        }
        trials = _try_decoding(pool, timeout_s) if has_gpu and checks["nvidia.dali"].status == "ok" else []
    gpus = tuple(Gpu(**gpu, served_by=tuple(_serving(gpu["compute_capability"], checks))) for gpu in found_gpus)
    return Report(
        kd_pipeline=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        num_cores=os.cpu_count() or 1,
        num_usable_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cuda_driver=cuda_driver,
        gpus=gpus,
        checks=(*checks.values(), *map(_check_of_trial, trials)),
        capabilities=tuple(_capabilities(checks, gpus, trials)),
    )


def _install_command(name: str, cuda_driver: str | None) -> str | None:
    """The command that installs a missing package, with the wheels that fit the driver."""
    if name == DRIVER:
        return None
    if name == "torch" or (name == "openvino" and cuda_driver):  # no extra for a GPU includes OpenVINO
        return f"pip install {name}"
    if cuda_driver:
        base = "cu12" if cuda_driver.startswith("12.") else "cu13"
    else:
        base = "cu13" if name == "cuda.core" else "cpu"
    return f"pip install 'kd_pipeline[{_EXTRAS.get(name, base)}]'"


def _serving(compute_capability: str, checks: Mapping[str, Check]) -> Iterator[str]:
    """The TensorRT packages that work here and support such a GPU."""
    major, minor = map(int, compute_capability.split("."))
    if checks["tensorrt"].status == "ok" and (major, minor) >= LOWEST_CAPABILITY:
        yield "tensorrt"
    if compute_capability in checks["tensorrt_rtx"].supports:
        yield "tensorrt_rtx"


def _try_decoding(pool: ThreadPoolExecutor, timeout_s: float) -> "list[DecodeTrial]":
    """Every way to decode on the first GPU, each in a child process."""
    from kd_pipeline.data.decode_trial import try_decoding

    ways: tuple[Literal["window", "full"], ...] = ("window", "full")
    trials = [
        pool.submit(try_decoding, way, device_id=0, hw_decoder_load=load, timeout_s=2 * timeout_s)
        for load, way in product(_HW_DECODER_LOADS, ways)
    ]
    return [trial.result() for trial in trials]


def _check_of_trial(trial: "DecodeTrial") -> Check:
    load = f", hw_decoder_load {trial.hw_decoder_load:g}" if trial.hw_decoder_load else ""
    version = None if trial.nvjpeg is None else f"nvJPEG {trial.nvjpeg[0]}.{trial.nvjpeg[1]}"
    status: Literal["ok", "broken"] = "ok" if trial.works else "broken"
    return Check(name=f"decode: {trial.decode} (GPU{load})", status=status, version=version, detail=trial.detail)


def _decoding(trials: "Sequence[DecodeTrial]") -> Iterator[Capability]:
    """What the trials on the first GPU mean for loaders. The choice for the default settings is cached for them."""
    from kd_pipeline.data.decode import keep_choice, pick_decode

    known = {(trial.decode, trial.hw_decoder_load): trial for trial in trials}
    try:
        choice = pick_decode(lambda mode, load: known[mode, load])
    except ConfigError as exc:
        yield Capability(kind="loader", name="gpu", works=False, detail=str(exc))
        return
    keep_choice(0, None, choice)
    yield Capability(kind="loader", name="gpu", works=True, detail="")
    taken = f"takes {choice.decode} with hw_decoder_load {choice.hw_decoder_load:g}"
    yield Capability(kind="setting", name="decode: auto", works=True, detail=f"{taken}; {choice.reason}")


def _capabilities(
    checks: Mapping[str, Check], gpus: Sequence[Gpu], trials: "Sequence[DecodeTrial]" = ()
) -> list[Capability]:
    def capability(kind: _Kind, name: str, *needed: str) -> Capability:
        """It works if the packages in `needed` do. Anything else in there is known to be missing."""
        status = {need: checks[need].status if need in checks else "" for need in needed}
        lacking = ", ".join(f"{need} ({state})" if state else need for need, state in status.items() if state != "ok")
        return Capability(kind=kind, name=name, works=not lacking, detail=lacking and f"needs {lacking}")

    served = [] if any(gpu.served_by for gpu in gpus) else ["a GPU that an installed TensorRT supports"]
    has_provider = not gpus or ("onnxruntime" in checks and CUDA_PROVIDER in checks["onnxruntime"].supports)
    provider = [] if has_provider else ["onnxruntime-gpu in place of onnxruntime"]
    # TensorRT-RTX builds without a GPU.
    has_builder = checks["tensorrt_rtx"].status == "ok" or (gpus and checks["tensorrt"].status == "ok")
    builder = [] if has_builder else ["tensorrt_rtx, or tensorrt and a GPU"]
    found = [
        capability("loader", "cpu", "nvidia.dali"),
        *(_decoding(trials) if trials else [capability("loader", "gpu", "nvidia.dali")] if gpus else []),
        capability("teacher", "pytorch", "torch"),
        capability("teacher", "openvino", "openvino", "onnx"),
        capability("teacher", "onnxruntime", "onnxruntime", "onnx", *provider),
        capability("teacher", "tensorrt", "cuda.core", *served),
        capability("command", "export", "onnx", "onnxscript", "onnxruntime"),
        capability("command", "build-engine", "onnx", "onnxscript", "onnxruntime", *builder),
    ]
    works = {each.name: each.works for each in found if each.kind == "teacher"}
    return [*found, _auto_backend(works, checks, on_gpu=bool(gpus))]


def _auto_backend(works: Mapping[str, bool], checks: Mapping[str, Check], *, on_gpu: bool) -> Capability:
    """What `backend: auto` takes; `works` says which backends do."""
    backend = next((each for each in (("tensorrt", "onnxruntime") if on_gpu else ("openvino",)) if works[each]), None)
    if backend is not None:
        file = f"{backend} runs an ONNX file"
    elif not on_gpu:
        file = "nothing runs an ONNX file (install 'kd_pipeline[cpu]')"
    else:
        tensorrt = "'kd_pipeline[trt]' or " if checks["tensorrt"].status == "missing" else ""
        file = f"nothing runs an ONNX file (install {tensorrt}onnxruntime-gpu in place of onnxruntime)"
    module = "pytorch runs a module" if works["pytorch"] else "nothing runs a module (install torch)"
    is_usable = works["pytorch"] and backend is not None
    return Capability(kind="setting", name="backend: auto", works=is_usable, detail=f"{module}, {file}")


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
