"""From a PyTorch module to an ONNX file that any teacher runtime opens, checked against the module."""

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_pipeline._core.optional import require
from kd_pipeline.errors import ExportError, TeacherError
from kd_pipeline.models.input_adapter import AdaptInput, InputAdapter
from kd_pipeline.models.modules import frozen_copy, named_outputs
from kd_pipeline.onnx.file import CLASSES_KEY, read_onnx
from kd_pipeline.onnx.session import open_session

__all__ = ["ADAPTER_KEY", "export_onnx"]

ADAPTER_KEY = "kd_pipeline.input_adapter"
"""Metadata key under which a file carries the adapter that is folded into it, as JSON."""

_TOLERANCE = 1e-4
"""Largest error of an output, relative to its largest value; float32 runtimes that agree stay near 1e-6."""


def export_onnx(
    module: nn.Module,
    path: str | Path,
    *,
    image_shape: tuple[int, int, int],
    classes: Sequence[str] | None = None,
    input_adapter: InputAdapter | None = None,
    opset: int | None = None,
    max_batch: int = 64,
) -> Path:
    """Write `module`, in eval mode, as an ONNX file with a dynamic batch, and check the file against the module.

    The file takes `"images"` `[N, 3, H, W]` float32 and returns `"logits"` `[N, K]`, and the other outputs by
    name where the module returns a mapping. Weights lie inside it; near 2 GB, ONNX's limit, in one file beside it.
    ONNX Runtime must agree with the module on 1, 2, 7 and `max_batch` random normal images, to 1e-4 of the largest
    value of each output; one size alone would not show a batch that the export has baked in. `module` stays as it is,
    and a failure leaves no file.

    Args:
        module: a float32 model; it returns what `PyTorchTeacher` describes.
        path: where the file goes; an existing one is replaced, missing folders are made.
        image_shape: `(3, H, W)` of the images that come in.
        classes: names of the K classes in logit order, kept in the file.
        input_adapter: folded into the graph in front of the module.
        opset: ONNX operator set; torch's default unless given.
        max_batch: largest batch that the check tries.

    Raises:
        ExportError: the module cannot be exported, or the file disagrees with it; the message holds the numbers.
        MissingPackageError: `onnx`, `onnxscript` or `onnxruntime` is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="cpu")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            file = Path(folder, path.name)
            adapter = nn.Identity() if input_adapter is None else AdaptInput(input_adapter)
            model = frozen_copy(_NamedOutputs(nn.Sequential(adapter, module))).cpu()
            program = _trace(model, image_shape, classes, opset)
            if classes is not None:
                program.model.metadata_props[CLASSES_KEY] = json.dumps(list(classes))
            if input_adapter is not None:
                program.model.metadata_props[ADAPTER_KEY] = input_adapter.model_dump_json()
            program.save(file)
            _check(model, file, image_shape, max_batch)
            for written in sorted(Path(folder).iterdir(), key=lambda written: written == file):  # the weights first
                os.replace(written, path.parent / written.name)
    except (ExportError, TeacherError, OSError) as exc:
        raise ExportError(f"{type(module).__qualname__} cannot be exported to {path}: {exc}") from exc
    return path


class _NamedOutputs(nn.Module):
    """A module whose outputs have their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(named_outputs(self.module(images)))


def _trace(
    model: nn.Module, image_shape: tuple[int, int, int], classes: Sequence[str] | None, opset: int | None
) -> torch.onnx.ONNXProgram:
    """`model` as an ONNX graph with a dynamic batch, without torch's prints and warnings."""
    images = torch.zeros(2, *image_shape)  # two, because torch.export takes a size of 1 for a constant
    try:
        outputs = model(images)
        if classes is not None and len(classes) != outputs["logits"].shape[-1]:
            raise ExportError(f"it has {outputs['logits'].shape[-1]} logits and got {len(classes)} class names")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=list(outputs),
                opset_version=opset,
                dynamic_shapes=({0: "batch"},),
                dynamo=True,
                verbose=False,
            )
    except (ExportError, TeacherError):
        raise
    except Exception as exc:
        raise ExportError(str(exc.__cause__ or exc)) from exc
    assert program is not None  # torch returns one whenever dynamo=True
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which name the source files of this machine
    return program


def _check(model: nn.Module, file: Path, image_shape: tuple[int, int, int], max_batch: int) -> None:
    """Compare `file` with `model` on random images, in batches of several sizes."""
    contract = read_onnx(file)
    session = open_session(file)
    generator = torch.Generator().manual_seed(0)
    for num_images in sorted({1, 2, 7, max_batch}):
        images = torch.randn(num_images, *image_shape, generator=generator)
        outputs = session.run(list(contract.output_names.values()), {contract.input_name: images.numpy()})
        found = {name: torch.from_numpy(output) for name, output in zip(contract.outputs, outputs, strict=True)}
        for name, wanted in model(images).items():
            if found[name].shape != wanted.shape:
                raise ExportError(
                    f"for {num_images} images the file gives {name!r} {list(found[name].shape)} and the module "
                    f"{list(wanted.shape)}"
                )
            if not wanted.isfinite().all():
                raise ExportError(f"it answers {name!r} with NaN or inf on random images; check its weights")
            error = (found[name] - wanted).abs().max().item()
            largest = wanted.abs().max().item()
            if not error <= _TOLERANCE * largest:  # not a plain >, so that NaN fails too
                raise ExportError(
                    f"for {num_images} images {name!r} of the file is off by {error:.3g}, with values up to "
                    f"{largest:.3g}; allowed is {_TOLERANCE:g} of that. Does the module branch on the batch size, "
                    "or draw random numbers?"
                )
