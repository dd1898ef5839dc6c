"""Changes to an ONNX file before it is built: an input adapter in front, extra outputs, class names."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.errors import EngineError, TeacherError
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.export import ADAPTER_KEY
from kd_pipeline.onnx.file import CLASSES_KEY, OnnxFile, read_onnx

__all__ = ["add_constant", "edit_onnx", "save_model"]

_LARGEST_INLINE = 1_500_000_000
"""Bytes of weights up to which they lie inside the file; protobuf ends at 2 GB."""
_RESIZE_OPSET = 11
"""Operator set that brought the half-pixel Resize, which is PyTorch's."""


def edit_onnx(
    source: Path,
    target: Path,
    *,
    input_adapter: InputAdapter | None = None,
    outputs: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the teacher `source` once more as `target`, with the changes asked for; `source` may be `target`.

    Args:
        source: an image classifier that `read_onnx` accepts.
        target: where the result goes; an existing file is replaced, missing folders are made.
        input_adapter: put in front of the graph, whose input keeps its name and type. The file answers as if the
            module had been exported with it. With a `size`, the new input takes images of any height and width.
        outputs: names of float tensors `[N, ...]` inside the graph that become outputs under their own names. A single
            output of any name is then renamed to `"logits"`, unless `outputs` holds that name.
        classes: names of the K classes in logit order, kept in the file.

    Raises:
        EngineError: the file has an adapter already, has another image size than the adapter gives, has no such
            tensor or another number of classes; names both sides.
        TeacherError: `source` is not an image classifier in ONNX.
        MissingPackageError: `onnx` or `onnx_ir` is not installed.
    """
    ir = require("onnx_ir", extra="cpu")
    file = read_onnx(source)
    model = ir.load(file.path)
    if input_adapter is not None:
        _add_adapter(model, file, input_adapter)
    if outputs:
        _add_outputs(model, file, outputs)
    if classes is not None:
        num_classes = file.outputs["logits"].shape[1]
        if num_classes not in (None, len(classes)):
            raise EngineError(f"{source} has {num_classes} logits and got {len(classes)} class names")
        model.metadata_props[CLASSES_KEY] = json.dumps(list(classes))
    return save_model(model, target)


def save_model(model: Any, target: Path) -> Path:
    """Write the `onnx_ir.Model` as `target`, whole or not at all, and checked as a teacher.

    Weights lie inside the file; near 2 GB, ONNX's limit, in one file beside it.

    Raises:
        EngineError: the model is not valid ONNX or not a teacher; `target` stays as it was.
    """
    ir = require("onnx_ir", extra="cpu")
    onnx = require("onnx", extra="cpu")
    num_bytes = sum(value.const_value.nbytes for graph in model.graphs() for value in graph.initializers.values())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".edit-", dir=target.parent) as folder:
        file = Path(folder, target.name)
        try:
            if num_bytes > _LARGEST_INLINE:
                ir.save(model, file, external_data=f"{target.name}.data")
            else:
                ir.save(ir.external_data.load_to_model(model), file)
            onnx.checker.check_model(file)
            read_onnx(file)
        except (TeacherError, ValueError, OSError, onnx.checker.ValidationError) as exc:
            raise EngineError(f"{target} cannot be written: {exc}") from exc
        for written in sorted(Path(folder).iterdir(), key=lambda written: written == file):  # the weights first
            os.replace(written, target.parent / written.name)
    return target


def add_constant(model: Any, name: str, array: NDArray[Any]) -> Any:
    """Add an initializer to the graph of the `onnx_ir.Model` and return its `onnx_ir.Value`."""
    ir = require("onnx_ir", extra="cpu")
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _add_adapter(model: Any, file: OnnxFile, adapter: InputAdapter) -> None:
    """Put `adapter` between the input and everything that reads it."""
    ir = require("onnx_ir", extra="cpu")
    if ADAPTER_KEY in model.metadata_props:
        raise EngineError(
            f"{file.path} has an input adapter already, {model.metadata_props[ADAPTER_KEY]}, and got "
            f"{adapter.model_dump_json()}; start from the file without one"
        )
    images = _images(model, file)
    readers = list(images.uses())
    nodes = _normalize(model, images, adapter)
    if adapter.size is not None:
        if any(size not in (None, adapter.size) for size in file.images.shape[2:]):
            raise EngineError(
                f"{file.path} takes images {file.images}, and the adapter resizes them to {adapter.size} x "
                f"{adapter.size}; set the adapter's size to what the file takes"
            )
        nodes += _resize(model, images, nodes[-1].outputs[0], adapter.size)
        # Without names: the graph may use a name such as H for the size after the adapter.
        images.shape = ir.Shape([images.shape[0], 3, None, None])
    for reader, position in readers:
        reader.replace_input_with(position, nodes[-1].outputs[0])
    model.graph.insert_before(model.graph[0], nodes)
    model.metadata_props[ADAPTER_KEY] = adapter.model_dump_json()


def _images(model: Any, file: OnnxFile) -> Any:
    """The input; old files list their weights beside it."""
    return next(value for value in model.graph.inputs if value.name == file.input_name)


def _normalize(model: Any, images: Any, adapter: InputAdapter) -> list[Any]:
    """Nodes for `(x · from_std + from_mean - mean) / std` per channel, in the type of the images."""
    ir = require("onnx_ir", extra="cpu")
    mean, std, from_mean, from_std = (
        np.array(values, np.float32).reshape(1, 3, 1, 1)
        for values in (adapter.mean, adapter.std, adapter.from_mean, adapter.from_std)
    )
    dtype = images.dtype.numpy()
    scale = add_constant(model, "input_adapter.scale", (from_std / std).astype(dtype))
    shift = add_constant(model, "input_adapter.shift", ((from_mean - mean) / std).astype(dtype))
    scaled = ir.node("Mul", [images, scale])
    return [scaled, ir.node("Add", [scaled.outputs[0], shift])]


def _resize(model: Any, images: Any, value: Any, size: int) -> list[Any]:
    """Nodes that resize `value`, as large as `images`, to `size` as `F.interpolate(mode="bilinear")` does."""
    ir = require("onnx_ir", extra="cpu")
    if model.opset_imports[""] < _RESIZE_OPSET:
        raise EngineError(
            f"the file uses operator set {model.opset_imports['']}, and a resize needs {_RESIZE_OPSET}; export it again"
        )
    start, end = (add_constant(model, f"input_adapter.{name}", np.array([n])) for name, n in (("start", 0), ("end", 2)))
    height_and_width = add_constant(model, "input_adapter.size", np.array([size, size]))
    shape = ir.node("Shape", [images])
    batch_and_channels = ir.node("Slice", [shape.outputs[0], start, end])
    sizes = ir.node("Concat", [batch_and_channels.outputs[0], height_and_width], {"axis": 0})
    how = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    return [shape, batch_and_channels, sizes, ir.node("Resize", [value, None, None, sizes.outputs[0]], how)]


def _add_outputs(model: Any, file: OnnxFile, names: Sequence[str]) -> None:
    """Make outputs of the tensors `names`, and `"logits"` of an output that was alone until now."""
    require("onnx_ir.passes.common", extra="cpu").ShapeInferencePass(check_type=False, strict_mode=False)(model)
    graph = model.graph
    inside = {value.name: value for node in graph for value in node.outputs if value.name}
    for name in names:
        if name in graph.initializers or any(name == value.name for value in graph.inputs):
            raise EngineError(f"{file.path}: {name!r} is an input or a weight, not a tensor that the graph computes")
        if name not in inside:
            # What comes last is nearest to the logits, and most often wanted.
            raise EngineError(f"{file.path} computes no tensor {name!r}{suggest(name, reversed(inside))}")
        if any(value is inside[name] for value in graph.outputs):
            raise EngineError(f"{file.path}: {name!r} is an output already; leave it out")
        _check_feature(file, inside[name], _images(model, file).shape[0])
        graph.outputs.append(inside[name])
    if "logits" not in {*file.output_names.values(), *names}:
        graph.outputs[0].name = "logits"


def _check_feature(file: OnnxFile, value: Any, batch: Any) -> None:
    """Refuse a tensor that a teacher cannot return: one without a float type, or without the batch in front."""
    ir = require("onnx_ir", extra="cpu")
    first = value.shape[0] if value.shape else 0
    # Shape inference makes up names such as unk__0; a product such as 4*batch counts something else than images.
    has_batch = isinstance(first, ir.SymbolicDim) and (first in (None, batch) or str(first).isidentifier())
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or not has_batch:
        raise EngineError(
            f"{file.path}: {value.name!r} is {value.type} {value.shape}, and an output must be float32 or float16 with "
            "the batch in front; choose another tensor"
        )
