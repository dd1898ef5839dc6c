"""A module as an ONNX file: exported once, and kept in the user's cache by everything that the file depends on."""

import hashlib
import inspect
import logging
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_pipeline._core.atomic_write import write_atomic
from kd_pipeline._core.kept_files import kept_folder
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import ExportError, MissingPackageError
from kd_pipeline.models.modules import frozen_copy, named_outputs
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.parity import generate_calibration_set
from kd_pipeline.teachers.pytorch import module_digest

__all__ = ["Examined", "examine", "export_key", "kept_export"]

_logger = logging.getLogger("kd_pipeline")

_ONNX, _OUTPUTS, _FAILURE = "teacher.onnx", "outputs.npz", "failure.txt"
"""Files in the folder of an export: it and the module's outputs for an image, or why it cannot be exported."""
_OUTPUT_PREFIX = "output."
"""Before an output's name among the arguments of `np.savez`, of which one is called `file`."""
_MAX_BATCH = 2
"""The export is checked on 1, 2 and 7 random images; its outputs in a runtime are compared with the module's later."""
_TOLERANCE = 0.02
"""Largest difference of an output between two float32 runs on any CPUs, relative to its largest magnitude."""
_PACKAGES = ("torch", "onnx", "onnxscript")
"""Which write the file."""
_NOT_STATE = {*vars(nn.Module()), "training"}
"""Attributes of a layer that its parameters, buffers and layers are in, or its hooks."""


@dataclass(frozen=True, slots=True)
class Examined:
    """A module, and what one forward pass of it shows."""

    module: nn.Module
    """A frozen copy in float32 on the CPU."""
    image_shape: tuple[int, ...]
    digest: str
    """The `module_digest` of the original."""
    flops: int
    """Floating-point operations for one image."""
    outputs: Mapping[str, Tensor]
    """For one generated image; float32."""


@torch.inference_mode(False)
@torch.no_grad()
def examine(module: nn.Module, image_shape: tuple[int, ...]) -> Examined:
    """Run a copy of `module` on one generated image, or row of another input, `[1, *image_shape]` float32 on the CPU.

    Raises:
        ExportError: it fails there.
    """
    model = frozen_copy(module).cpu()
    digest = module_digest(model)
    model = model.float()
    image = generate_calibration_set(image_shape, 1).images
    try:
        with FlopCounterMode(display=False) as counter:
            outputs = {name: output.float().clone() for name, output in named_outputs(model(image)).items()}
    except Exception as exc:  # a module may do anything
        raise ExportError(f"{type(module).__qualname__} fails on a float32 image on the CPU: {exc}") from exc
    return Examined(model, image_shape, digest, counter.get_total_flops(), outputs)


def kept_export(found: Examined) -> Path:
    """The ONNX file of a module: an earlier export of the same weights, layers, code and packages, or a new one.

    What the key does not cover, such as a function of another file, is noticed by the outputs for one image.

    Raises:
        ExportError: the module cannot be exported, which is kept too, or its outputs are no longer those of the export.
        MissingPackageError: a package that exports is not installed.
    """
    key = export_key(found)
    folder = kept_folder("exports", key, lambda building: _export(found, building))
    if (failure := folder / _FAILURE).is_file():
        raise ExportError(failure.read_text(encoding="utf-8"))
    with np.load(folder / _OUTPUTS, allow_pickle=False) as saved:
        outputs = {name.removeprefix(_OUTPUT_PREFIX): torch.from_numpy(saved[name]) for name in saved.files}
    if not _same(outputs, found.outputs):
        raise ExportError(
            f"the outputs of {type(found.module).__qualname__} have changed since it was exported to {folder}, and its "
            "weights, layers and code have not: they depend on something else, such as a function of another file or a "
            "global variable; remove that folder to export it again"
        )
    return folder / _ONNX


def export_key(found: Examined) -> str:
    """Digest of all that the export of a module depends on: weights, layers, code, image shape and packages."""
    digest = hashlib.sha256(f"export 2 {__version__} {found.digest} {found.image_shape}\n".encode())
    digest.update(" ".join(f"{name} {metadata.version(name)}" for name in _installed(_PACKAGES)).encode())
    for name, layer in found.module.named_modules():
        state = {key: value for key, value in vars(layer).items() if key not in _NOT_STATE}
        digest.update(f"{name} {_described(state)}\n".encode())
    classes = {kind for layer in found.module.modules() for kind in type(layer).__mro__}
    for line in sorted({_code(kind) for kind in classes}):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _export(found: Examined, folder: Path) -> None:
    name = type(found.module).__qualname__
    _logger.info("exporting %s to ONNX once; the file is kept in %s", name, folder.parent)
    try:
        export_onnx(found.module, folder / _ONNX, image_shape=found.image_shape, max_batch=_MAX_BATCH)
    except (MissingPackageError, OSError, MemoryError):
        raise
    except Exception as exc:  # of a runtime that checks the file, too
        if isinstance(exc.__cause__, OSError):  # such as a full disk
            raise
        write_atomic(folder / _FAILURE, str(exc.__cause__ or exc))
        return
    arrays: dict[str, Any] = {f"{_OUTPUT_PREFIX}{name}": output.numpy() for name, output in found.outputs.items()}
    with open(folder / _OUTPUTS, "wb") as file:
        np.savez(file, **arrays)


def _same(saved: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> bool:
    if saved.keys() != outputs.keys():
        return False
    return all(
        output.shape == saved[name].shape
        and (output - saved[name]).abs().max().nan_to_num(torch.inf) <= _TOLERANCE * saved[name].abs().max()
        for name, output in outputs.items()
    )


def _installed(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        yield name


def _described(value: object) -> str:
    """Plain values as text that is the same in every process; of anything else, its type."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype():
            return repr(value)
        case Tensor():
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
        case list() | tuple():
            return f"[{', '.join(map(_described, value))}]"
        case set() | frozenset():
            return f"{{{', '.join(sorted(map(_described, value)))}}}"
        case dict():
            return f"{{{', '.join(f'{_described(key)}: {_described(item)}' for key, item in value.items())}}}"
        case _:
            return type(value).__qualname__


def _code(kind: type) -> str:
    """What stands for the code of a class: its package's version if it is installed, else its file."""
    module = sys.modules.get(kind.__module__)
    package = sys.modules.get(kind.__module__.partition(".")[0])
    version = getattr(package, "__version__", None)
    try:
        file = Path(inspect.getfile(kind))
    except (OSError, TypeError):  # it is built in, or was typed into a terminal
        return f"{kind.__module__}.{kind.__qualname__}"
    is_installed = any(file.is_relative_to(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib"))
    if module is None or not file.is_file() or (is_installed and isinstance(version, str)):
        return f"{kind.__module__.partition('.')[0]} {version}"
    return f"{kind.__module__} {hashlib.sha256(file.read_bytes()).hexdigest()}"
