"""Exports a PyTorch module to an ONNX file that every teacher backend can run, and checks the file's outputs."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_pipeline._core.finite import first_nonfinite
from kd_pipeline._core.optional import require
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.progress import Report, no_report
from kd_pipeline.errors import ExportError, TeacherError
from kd_pipeline.models.backbone import prefix_tokens_of
from kd_pipeline.models.input_adapter import InputAdapter, InputAdapterLayer
from kd_pipeline.models.modules import frozen_copy, named_outputs
from kd_pipeline.onnx.file import (
    ADAPTER_KEY,
    CLASSES_KEY,
    OUTPUTS_KEY,
    outputs_metadata,
    read_onnx,
    replace_onnx,
)
from kd_pipeline.onnx.session import open_session

__all__ = ["export_onnx"]

_TOLERANCE = 1e-4
"""Largest allowed error of an output, relative to its largest magnitude; usual is 1e-6 between float32 runtimes."""
_TRACED_BATCH = 2
"""Images of the trace; torch.export takes a size of 1 for a constant."""
_NUM_STEPS = 3
"""Trace, file, check."""
_CHECKED_BATCHES = (1, 3)
"""Images of the checks: fewer than traced, and more but no multiple. A file with a constant batch of two, or with rows
that are folded by twos, is wrong for either, and random numbers differ for any."""


def export_onnx(
    module: nn.Module,
    path: str | Path,
    *,
    image_shape: tuple[int, ...],
    classes: Sequence[str] | None = None,
    input_adapter: InputAdapter | None = None,
    opset: int | None = None,
    max_batch: int = 64,
    report: Report = no_report,
) -> Path:
    """Export `module`, in eval mode and with a dynamic batch, and check the file against the module.

    The file maps `"images"` `[N, 3, H, W]` float32, or `"input"` of another shape, to the outputs that the module has
    as a teacher: a tensor `[N, K]` is called `"logits"` and any other `"spatial"`, and a mapping keeps its names, but
    for values that are None. It also says how many class and register tokens are at the start of tokens, where the
    module does. Weights are stored in the file or, near ONNX's limit of 2 GB, in one file next to it.

    ONNX Runtime's outputs must equal the module's on 1 and 3 random normal images, to 1e-4 of the largest magnitude of
    each output. It was traced with 2, so a batch size that the export made constant shows. If the module compares the
    batch size with a number, the first size for which the file may be wrong is checked too, up to `max_batch`. `module`
    is unchanged, and no file is left after a failure.

    Args:
        module: a float32 model that returns a tensor, or a mapping of tensors by name, as of Hugging Face.
        path: the file to write; an existing one is replaced, missing folders are created.
        image_shape: `(3, H, W)` of the images, or the sizes of a row of another float32 input.
        classes: names of the K classes in logit order, stored in the file; only for a module with logits.
        input_adapter: becomes the first layer of the graph.
        opset: ONNX opset; defaults to torch's.
        max_batch: largest batch size to check, for a module that branches on it.
        report: called with the number of steps that are done, and that there are: trace, file, check.

    Raises:
        ExportError: the module cannot be exported, or the file's outputs differ; the message holds the numbers.
        MissingPackageError: `onnx`, `onnxscript` or `onnxruntime` is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="cpu")
    path = argument_path(path)
    try:
        if (bad := first_nonfinite(module)) is not None:
            raise ExportError(
                f"its weights hold NaN or inf, first in {bad!r}; export weights from before that happened"
            )
        with replace_onnx(path) as file:
            adapter = nn.Identity() if input_adapter is None else InputAdapterLayer(input_adapter)
            model = frozen_copy(_NamedOutputs(nn.Sequential(adapter, module))).cpu()
            report(0, _NUM_STEPS)
            program = _trace(model, image_shape, classes, opset)
            report(1, _NUM_STEPS)
            if classes is not None:
                program.model.metadata_props[CLASSES_KEY] = json.dumps(list(classes))
            if input_adapter is not None:
                program.model.metadata_props[ADAPTER_KEY] = input_adapter.model_dump_json()
            program.save(file)
            report(2, _NUM_STEPS)
            _check_outputs(model, file, image_shape, _checked_batches(program, max_batch))
    except (ExportError, TeacherError, OSError) as exc:
        raise ExportError(f"{type(module).__qualname__} cannot be exported to {path}: {exc}") from exc
    return path


class _NamedOutputs(nn.Module):
    """A module that returns its outputs as a dict."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(named_outputs(self.module(images)))


def _trace(
    model: nn.Module, image_shape: tuple[int, ...], classes: Sequence[str] | None, opset: int | None
) -> torch.onnx.ONNXProgram:
    """`model` as an ONNX graph with a dynamic batch, without torch's prints and warnings."""
    images = torch.zeros(_TRACED_BATCH, *image_shape)
    try:
        outputs = model(images)
        _check_classes(classes, outputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images" if len(image_shape) == 3 else "input"],
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
        node.metadata_props.clear()  # stack traces with paths of this machine
    program.model.metadata_props[OUTPUTS_KEY] = outputs_metadata(prefix_tokens_of(model, outputs))
    return program


def _check_classes(classes: Sequence[str] | None, outputs: Mapping[str, Tensor]) -> None:
    if classes is None:
        return
    if "logits" not in outputs:
        raise ExportError(
            f"it returns {', '.join(map(repr, outputs))} and no 'logits', which class names are for; leave classes out"
        )
    if len(classes) != outputs["logits"].shape[1]:
        raise ExportError(f"it has {outputs['logits'].shape[1]} logits and got {len(classes)} class names")


def _checked_batches(program: torch.onnx.ONNXProgram, max_batch: int) -> list[int]:
    """The batch sizes to check: `_CHECKED_BATCHES`, and the first past each limit of the trace, up to `max_batch`.

    `if len(images) > 20` in the module becomes the branch that two images take, and the trace has the limit 20.
    """
    assert program.exported_program is not None  # it was made from one
    limits = [each.upper for each in program.exported_program.range_constraints.values()]
    return sorted({*_CHECKED_BATCHES, *(int(limit) + 1 for limit in limits if limit < max_batch)})


def _check_outputs(model: nn.Module, path: Path, image_shape: tuple[int, ...], batches: Sequence[int]) -> None:
    """Compare the outputs of the file and of `model` on random images, for several batch sizes."""
    file, session = read_onnx(path), open_session(path)
    generator = torch.Generator().manual_seed(0)
    for num_images in batches:
        images = torch.randn(num_images, *image_shape, generator=generator)
        outputs = session.run(list(file.output_names.values()), {file.input_name: images.numpy()})
        found = {name: torch.from_numpy(output) for name, output in zip(file.outputs, outputs, strict=True)}
        for name, expected in model(images).items():
            if found[name].shape != expected.shape:
                raise ExportError(
                    f"for {num_images} images the file returns {name!r} {list(found[name].shape)} and the module "
                    f"{list(expected.shape)}"
                )
            if not expected.isfinite().all():
                raise ExportError(f"{name!r} is NaN or inf on random images; check the module's weights")
            error = (found[name] - expected).abs().max().item()
            largest = expected.abs().max().item()
            if not error <= _TOLERANCE * largest:  # not a plain >, to catch NaN
                raise ExportError(
                    f"for {num_images} images {name!r} of the file is off by {error:.3g}, with values up to "
                    f"{largest:.3g}; allowed is {_TOLERANCE:g} of that. Does the module branch on the batch size, "
                    "or draw random numbers?"
                )
