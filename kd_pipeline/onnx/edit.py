"""Edits of an ONNX teacher: an input adapter in front, extra outputs, class names."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import EngineError, TeacherError
from kd_pipeline.models.input_adapter import InputAdapter, scale_and_shift
from kd_pipeline.onnx.file import ADAPTER_KEY, CLASSES_KEY, OnnxFile, read_onnx, replace_onnx
from kd_pipeline.onnx.weights import shortened

__all__ = ["add_constant", "edit_onnx", "open_model", "save_model"]

_MAX_INLINE_BYTES = 1_500_000_000
"""Largest weights that are stored inside the file; protobuf's limit is 2 GB."""
_RESIZE_OPSET = 11
"""First opset with a half-pixel Resize, which is PyTorch's."""


def edit_onnx(
    source: Path,
    target: Path,
    *,
    input_adapter: InputAdapter | None = None,
    outputs: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the teacher `source` with changes to `target`, which may be the same file.

    Args:
        source: a teacher that `read_onnx` accepts.
        target: the file to write; an existing one is replaced, missing folders are created.
        input_adapter: inserted before the graph; the input keeps its name and type. The outputs are those of the module
            exported with the adapter. With a `size`, the new input accepts any height and width.
        outputs: names of float tensors `[N, ...]` of the graph to add as outputs. A single output that counts as the
            logits is then renamed to `"logits"`, unless `outputs` has that name.
        classes: names of the K classes in logit order, stored in the file.

    Raises:
        EngineError: the file already has an adapter, its image size is not the adapter's, it has no such tensor, no
            logits for the classes or a different number of them; the message has both sides.
        TeacherError: `source` is not a teacher in ONNX.
        MissingPackageError: `onnx` or `onnx_ir` is not installed.
    """
    file = read_onnx(source)
    with open_model(file) as model:
        if input_adapter is not None:
            _add_adapter(model, file, input_adapter)
        if outputs:
            _add_outputs(model, file, outputs)
        if classes is not None:
            if (logits := file.outputs.get("logits")) is None:
                raise EngineError(
                    f"{source} returns {', '.join(map(repr, file.outputs))} and no 'logits', which class names are "
                    "for; leave classes out"
                )
            num_classes = logits.shape[1]
            if num_classes not in (None, len(classes)):
                raise EngineError(f"{source} has {num_classes} logits and got {len(classes)} class names")
            model.metadata_props[CLASSES_KEY] = json.dumps(list(classes))
        return save_model(model, target)


@contextmanager
def open_model(file: OnnxFile) -> Iterator[Any]:
    """The content that was read as `file`, as an `onnx_ir.Model`, which reads external weights only inside the `with`.

    Raises:
        TeacherError: the file was changed since.
        EngineError: it is not valid ONNX.
    """
    ir, onnx = require("onnx_ir", extra="cpu"), require("onnx", extra="cpu")
    with file.private_copy() as copy:
        try:
            onnx.checker.check_model(copy)  # what edits may rely on: names that are unique, nodes in order
            model = ir.load(copy)
        except Exception as exc:  # each package has its own error classes
            raise EngineError(
                f"{file.path} is not valid ONNX: {shortened(exc, copy, file.path)}; export it again"
            ) from exc
        yield model


def save_model(model: Any, target: Path) -> Path:
    """Write the `onnx_ir.Model` to `target` atomically, after validating it as a teacher.

    Weights are stored in the file or, near ONNX's limit of 2 GB, in one file next to it.

    Raises:
        EngineError: the model is not valid ONNX or not a teacher; `target` is unchanged.
    """
    ir, onnx = require("onnx_ir", extra="cpu"), require("onnx", extra="cpu")
    num_bytes = sum(value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values())
    with replace_onnx(target) as path:
        try:
            if num_bytes > _MAX_INLINE_BYTES:
                ir.save(model, path, external_data=f"{target.name}.data")
            else:
                ir.save(ir.external_data.load_to_model(model), path)
            onnx.checker.check_model(path)
            read_onnx(path)
        except (TeacherError, ValueError, OSError, onnx.checker.ValidationError) as exc:
            raise EngineError(f"{target} cannot be written: {exc}") from exc
    return target


def add_constant(model: Any, name: str, array: NDArray[Any]) -> Any:
    """Add an initializer to the graph of the `onnx_ir.Model` and return its `onnx_ir.Value`."""
    ir = require("onnx_ir", extra="cpu")
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _add_adapter(model: Any, file: OnnxFile, adapter: InputAdapter) -> None:
    """Insert `adapter` between the input and its consumers."""
    ir = require("onnx_ir", extra="cpu")
    if file.input_adapter is not None:
        raise EngineError(
            f"{file.path} already has an input adapter, {file.input_adapter.model_dump_json()}, and got "
            f"{adapter.model_dump_json()}; start from the file without one"
        )
    images = _find_input(model, file)
    consumers = list(images.uses())
    nodes = _normalize(model, images, adapter)
    if (size := adapter.height_width) is not None:
        if any(found not in (None, wanted) for found, wanted in zip(file.images.shape[2:], size, strict=True)):
            raise EngineError(
                f"{file.path} takes images {file.images}, and the adapter resizes them to {size[0]} x "
                f"{size[1]}; set the adapter's size to that of the file"
            )
        nodes += _resize(model, nodes[-1].outputs[0], size)
        # Unnamed sizes: the graph may use a name such as H for the size after the adapter.
        images.shape = ir.Shape([images.shape[0], 3, None, None])
    elif len(adapter.mean) == 1:
        images.shape = ir.Shape([images.shape[0], 3, *list(images.shape)[2:]])
    for consumer, position in consumers:
        consumer.replace_input_with(position, nodes[-1].outputs[0])
    model.graph.insert_before(model.graph[0], nodes)
    model.metadata_props[ADAPTER_KEY] = adapter.model_dump_json()


def _find_input(model: Any, file: OnnxFile) -> Any:
    """The images; old files list weights among the inputs."""
    return next(value for value in model.graph.inputs if value.name == file.input_name)


def _normalize(model: Any, images: Any, adapter: InputAdapter) -> list[Any]:
    """Nodes for what `InputAdapterLayer` computes before its resize, in the dtype of the images."""
    ir = require("onnx_ir", extra="cpu")
    scale, shift = (
        add_constant(model, f"input_adapter.{name}", values.astype(images.dtype.numpy()))
        for name, values in zip(("scale", "shift"), scale_and_shift(adapter), strict=True)
    )
    nodes = [ir.node("Mul", [images, scale])]
    if len(adapter.mean) == 1:
        axis = add_constant(model, "input_adapter.axis", np.array([1]))
        nodes.append(ir.node("ReduceSum", [nodes[-1].outputs[0], axis], {"keepdims": 1}))
    return [*nodes, ir.node("Add", [nodes[-1].outputs[0], shift])]


def _resize(model: Any, value: Any, size: tuple[int, int]) -> list[Any]:
    """Nodes that resize `value` to `size` like `F.interpolate(mode="bilinear")`."""
    ir = require("onnx_ir", extra="cpu")
    if (opset := model.opset_imports[""]) < _RESIZE_OPSET:
        raise EngineError(f"the file has opset {opset}, and a resize needs {_RESIZE_OPSET}; export it again")
    start, end = (add_constant(model, f"input_adapter.{name}", np.array([n])) for name, n in (("start", 0), ("end", 2)))
    height_and_width = add_constant(model, "input_adapter.size", np.array(size))
    shape = ir.node("Shape", [value])
    batch_and_channels = ir.node("Slice", [shape.outputs[0], start, end])
    sizes = ir.node("Concat", [batch_and_channels.outputs[0], height_and_width], {"axis": 0})
    attributes = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    return [shape, batch_and_channels, sizes, ir.node("Resize", [value, None, None, sizes.outputs[0]], attributes)]


def _add_outputs(model: Any, file: OnnxFile, names: Sequence[str]) -> None:
    """Add the tensors `names` to the outputs, and rename the one that counts as the logits."""
    require("onnx_ir.passes.common", extra="cpu").ShapeInferencePass(check_type=False, strict_mode=False)(model)
    graph = model.graph
    computed = {value.name: value for node in graph for value in node.outputs if value.name}
    for name in names:
        if name in graph.initializers or any(name == value.name for value in graph.inputs):
            raise EngineError(f"{file.path}: {name!r} is an input or a weight, not a tensor that the graph computes")
        if name not in computed:
            # Reversed: features near the logits are wanted most often.
            raise EngineError(f"{file.path} computes no tensor {name!r}{suggest(name, reversed(computed))}")
        if any(value is computed[name] for value in graph.outputs):
            raise EngineError(f"{file.path}: {name!r} is an output already; leave it out")
        _check_feature(file, computed[name], _find_input(model, file).shape[0])
        graph.outputs.append(computed[name])
    if file.output_names.get("logits", "logits") != "logits" and "logits" not in names:
        graph.outputs[0].name = "logits"


def _check_feature(file: OnnxFile, value: Any, batch: Any) -> None:
    """Reject a tensor that cannot be an output of a teacher: not floating, or without the batch as first dimension."""
    ir = require("onnx_ir", extra="cpu")
    first = value.shape[0] if value.shape else 0
    # Shape inference invents names such as unk__0. A product such as 4*batch is not the number of images.
    has_batch = isinstance(first, ir.SymbolicDim) and (first in (None, batch) or str(first).isidentifier())
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or not has_batch:
        raise EngineError(
            f"{file.path}: {value.name!r} is {value.type} {value.shape}, and an output must be float32 or float16 with "
            "the batch as its first dimension; choose another tensor"
        )
