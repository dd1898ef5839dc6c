"""An ONNX file in half precision, and the same arithmetic acted out in float32 for machines that lack it."""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.edit import add_constant, save_model
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.session import FATAL, open_session

__all__ = ["CONVERTER_VERSION", "convert_precision", "emulate_precision"]

CONVERTER_VERSION = 1
"""Goes into an engine's key; raise it whenever the output of this module changes."""

_LARGEST = 65504 / 4
"""Largest magnitude that float16 is trusted with: a quarter of its own, for images that are not among the samples."""
_SMALLEST = 2**-24
"""Smallest magnitude that float16 tells from zero; a smaller epsilon would let a division by zero through."""
_NOT_IN_TENSORRT = {
    "fp16": {"Celu", "LSTM", "MeanVarianceNormalization"},
    "bf16": {"Celu", "GRU", "HardSwish", "LSTM", "LpNormalization", "LpPool", "MeanVarianceNormalization", "Mish"},
}
"""Operators that ONNX has in half precision and the parser of TensorRT-RTX 1.7 has not; ONNX's own test cases tell."""
_BFLOAT16_OPSET = 13
"""Operator set that brought bfloat16 to Cast."""
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}
_BATCH_SIZE = 8
"""Images at a time while ranges are measured, to bound the memory."""
_FATAL_ONLY = 4
"""What ONNX Runtime may print; its errors are raised."""

_Precision = Literal["fp16", "bf16"]


def convert_precision(
    source: Path, target: Path, precision: _Precision, samples: Tensor, *, half_io: bool = False
) -> tuple[str, ...]:
    """Write the float32 teacher `source` as `target` with weights and arithmetic in half precision.

    TensorRT's strongly typed networks take their precision from such a file. Inputs and outputs keep their names and
    stay float32, with a Cast at each; metadata stays. The operator set stays too: below 22 ONNX allows bfloat16 in few
    operators, which TensorRT does not mind. These nodes stay in float32:

    - for `"fp16"`, those that read or write a value that float16 cannot hold: the largest finite magnitude, among the
      weights or on `samples`, is above 65504 / 4, or too small to tell from zero. Infinities are exact in float16.
      What reads a sum with such a small number, an epsilon, stays with it;
    - those that compute with sizes and indices alone, which half precision would round;
    - those with subgraphs (`If`, `Loop`, `Scan`), and all that is in them;
    - operators that ONNX or TensorRT lacks in this precision, and `QuantizeLinear` and `DequantizeLinear`.

    Args:
        source: a float32 image classifier that `read_onnx` accepts.
        target: where the file goes; an existing one is replaced, missing folders are made.
        precision: the type of weights and arithmetic.
        samples: `[N, 3, H, W]` float32 images as in training, which ONNX Runtime runs to find the range of every
            value; `"bf16"` has the range of float32 and does not need them run.
        half_io: the images come as float16, in either precision; the outputs are float32 even so.

    Returns:
        Names of the nodes that stay in float32, in the file's order, without quantizers.

    Raises:
        EngineError: the file is not in float32, has custom operators or an operator set without bfloat16, or
            `samples` do not fit; `target` stays as it was.
        TeacherError: `source` is not an image classifier in ONNX.
        MissingPackageError: `onnx`, `onnx_ir` or `onnxruntime` is not installed.
    """
    dtypes = require("onnx_ir", extra="cpu").DataType
    _check_source(source, samples)
    model = _load(source, precision)
    beyond = _values_beyond_float16(source, samples) if precision == "fp16" else set()
    half = dtypes.FLOAT16 if precision == "fp16" else dtypes.BFLOAT16
    reads: set[tuple[Any, int]] = set()
    writes: list[Any] = []
    for node in _movable_nodes(model.graph, beyond, _NOT_IN_TENSORRT[precision]):
        inputs, outputs = _half_ports(node, half, model.opset_imports[""])
        reads.update((node, index) for index in inputs)
        writes += outputs
    moved = {node for node, _ in reads} | {value.producer() for value in writes}
    kept = tuple(node.name for node in model.graph if node not in moved and _computes_in_float32(node))
    _move(model.graph, half, reads, writes, dtypes.FLOAT16 if half_io else dtypes.FLOAT)
    require("onnx_ir.passes.common", extra="cpu").RemoveUnusedNodesPass()(model)
    save_model(model, target)
    return kept


def emulate_precision(source: Path, target: Path) -> Path:
    """Write `source`, made by `convert_precision`, as `target` in float32 with every result rounded to half precision.

    Each value in half precision is computed in float32, then cast to half precision and back. ONNX Runtime does such
    Casts to the letter, if its optimizer is off, while of half precision itself it knows too little: its CPU provider
    lacks most operators in bfloat16, and float16 it widens and fuses, so that an overflow goes unseen. Names and
    types of inputs and outputs are those of `source`.

    Returns:
        `target`.

    Raises:
        EngineError: `target` cannot be written.
        MissingPackageError: `onnx` or `onnx_ir` is not installed.
    """
    ir = require("onnx_ir", extra="cpu")
    halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    model = ir.load(source)
    graph = model.graph
    for weights in graph.initializers.values():
        if weights.dtype in halves:
            weights.const_value = _rounded(weights.const_value, ir.DataType.FLOAT)
            weights.type = ir.TensorType(ir.DataType.FLOAT)
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.dtype not in halves:
            continue
        uses, node, half = value.uses(), value.producer(), value
        if node is not None and node.op_type != "Cast":  # a Cast rounds by itself
            half = _cast(value, value.dtype, graph)
            _set_type(value, ir.DataType.FLOAT)
        widened = _cast(half, ir.DataType.FLOAT, graph)
        for user, index in uses:
            user.replace_input_with(index, widened)
    return save_model(model, target)


def _check_source(path: Path, samples: Tensor) -> None:
    file = read_onnx(path)
    found = TensorSpec(tuple(samples.shape), samples.dtype)
    if not file.images.accepts(tuple(samples.shape), samples.dtype):
        raise EngineError(f"{path} takes images {file.images}, and the samples are {found}")
    specs = {file.input_name: file.images, **file.outputs}
    others = [f"{name!r} is {spec}" for name, spec in specs.items() if spec.dtype != torch.float32]
    if file.precision != "fp32" or others:
        reasons = ", ".join([f"its weights are {file.precision}", *others])
        raise EngineError(f"{path} is not in float32: {reasons}; export the teacher in float32 and convert that")


def _load(path: Path, precision: _Precision) -> Any:
    """The model in `path` with functions inlined, constants among the weights, a name per node and every type known."""
    passes = require("onnx_ir.passes.common", extra="cpu")
    model = require("onnx_ir", extra="cpu").load(path)
    opset = model.opset_imports[""]
    if precision == "bf16" and opset < _BFLOAT16_OPSET:
        raise EngineError(
            f"{path} is in ONNX operator set {opset}, and bfloat16 came with {_BFLOAT16_OPSET}; export the teacher "
            "again with a newer one"
        )
    for step in (
        passes.InlinePass(),
        passes.RemoveInitializersFromInputsPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.NameFixPass(),
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False),
    ):
        step(model)
    for node in model.graph.all_nodes():
        _check_node(node, path)
    return model


def _check_node(node: Any, path: Path) -> None:
    defs = require("onnx", extra="cpu").defs
    if node.domain or not defs.has(node.op_type):
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise EngineError(
            f"{path}: node {node.name!r} is {name}, which is not one of ONNX's own operators; no custom ops are "
            "converted, export the teacher without it"
        )
    parameters = defs.get_schema(node.op_type).outputs
    for index, value in enumerate(node.outputs):
        makes_tensors = any(name.startswith("tensor(") for name in _nth(parameters, index).types)
        if value.name and (value.dtype is None or not makes_tensors):
            reason = "of a type that cannot be told" if makes_tensors else "not a tensor"
            raise EngineError(
                f"{path}: {value.name!r}, made by node {node.name!r} ({node.op_type}), is {reason}; only tensors are "
                "converted, export the teacher without it"
            )


def _is_float32(value: Any) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def _float32_values(node: Any) -> Iterator[Any]:
    """What a node reads and writes in float32."""
    return (value for value in (*node.inputs, *node.outputs) if _is_float32(value))


def _has_subgraph(node: Any) -> bool:
    return any(attribute.type.name in {"GRAPH", "GRAPHS"} for attribute in node.attributes.values())


def _computes_in_float32(node: Any) -> bool:
    return node.op_type not in {"Cast", *_QUANTIZERS} and (_has_subgraph(node) or any(_float32_values(node)))


def _movable_nodes(graph: Any, beyond: Collection[str], float32_only: Collection[str]) -> Iterator[Any]:
    """The nodes that may run in half precision; `beyond` names values that may not, `float32_only` operators."""
    exact: set[Any] = set()  # float32 values that follow from sizes and indices alone
    for node in graph:
        sources = [value for value in node.inputs if _is_float32(value)]
        if node.op_type == "Cast":
            if node.inputs[0].dtype.is_integer():
                exact.update(node.outputs)
        elif not exact.isdisjoint(sources) and all(value in exact or value.is_initializer() for value in sources):
            exact.update(node.outputs)
        elif not (
            node.op_type in _QUANTIZERS
            or node.op_type in float32_only
            or _has_subgraph(node)
            or any(value.name in beyond for value in _float32_values(node))
        ):
            yield node


def _half_ports(node: Any, half: Any, opset: int) -> tuple[Sequence[int], Sequence[Any]]:
    """Which inputs of `node`, by index, and which of its outputs become `half`.

    An input does if the newest version of the operator allows it, since ONNX has bfloat16 in most from 22 on only. An
    output does if it has the type of such an input.
    """
    defs = require("onnx", extra="cpu").defs
    if node.op_type == "ConstantOfShape":
        return [], [value for value in node.outputs if _is_float32(value)]
    schema, newest = defs.get_schema(node.op_type, opset), defs.get_schema(node.op_type).inputs
    by_name = {parameter.name: parameter for parameter in newest}
    inputs, types = [], set()
    for index, value in enumerate(node.inputs):
        if _is_float32(value):
            parameter = _nth(schema.inputs, index)
            if f"tensor({half.name.lower()})" in by_name.get(parameter.name, _nth(newest, index)).types:
                inputs.append(index)
                types.add(parameter.type_str)
    outputs = [
        value
        for index, value in enumerate(node.outputs)
        if _is_float32(value) and _nth(schema.outputs, index).type_str in types
    ]
    return inputs, outputs


def _nth(parameters: Sequence[Any], index: int) -> Any:
    """The parameter at `index` of an operator, whose last one may stand for many."""
    return parameters[min(index, len(parameters) - 1)]


def _move(graph: Any, half: Any, reads: Collection[tuple[Any, int]], writes: Sequence[Any], images: Any) -> None:
    """Make the values `writes` `half`, and the input of the graph `images`, with Casts to what each node reads."""
    ir = require("onnx_ir", extra="cpu")
    # Noted before any type changes. A Cast of the file itself reads whatever there is.
    floats = [
        (node, index)
        for node in graph.all_nodes()
        for index, value in enumerate(node.inputs)
        if node.op_type != "Cast" and _is_float32(value)
    ]
    graph.inputs[0].type = ir.TensorType(images)
    for value in writes:
        _set_type(value, half)
    made: dict[tuple[Any, Any], Any] = {}
    for node, index in floats:
        dtype = half if (node, index) in reads else ir.DataType.FLOAT
        node.replace_input_with(index, _as_type(node.inputs[index], dtype, graph, made))
    for index, value in enumerate(graph.outputs):
        if value.dtype == half:
            name, value.name = value.name, f"{value.name}.{half.name.lower()}"
            graph.outputs[index] = _as_type(value, ir.DataType.FLOAT, graph, made)
            graph.outputs[index].name = name


def _set_type(value: Any, dtype: Any) -> None:
    """Let a node make its output `value` as `dtype`, which follows from its inputs unless it fills a shape."""
    ir = require("onnx_ir", extra="cpu")
    value.type = ir.TensorType(dtype)
    node = value.producer()
    if node.op_type == "ConstantOfShape":
        fill = node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor([0.0])
        node.attributes["value"] = ir.AttrTensor("value", _rounded(fill, dtype))


def _as_type(value: Any, dtype: Any, graph: Any, made: dict[tuple[Any, Any], Any]) -> Any:
    """`value` as `dtype`: itself, or one Cast or copy of the weights for all who ask, remembered in `made`."""
    if value.dtype == dtype:
        return value
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":  # start from what that one read, so as to round once
        return _as_type(producer.inputs[0], dtype, graph, made)
    if (value, dtype) not in made:
        made[value, dtype] = (_copy_weights if value.is_initializer() else _cast)(value, dtype, graph)
    return made[value, dtype]


def _cast(value: Any, dtype: Any, graph: Any) -> Any:
    """The output of a new Cast, right behind the node that makes `value`."""
    ir = require("onnx_ir", extra="cpu")
    node = ir.node("Cast", [value], {"to": dtype}, outputs=[ir.Value(shape=value.shape, type=ir.TensorType(dtype))])
    if value.producer() is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(value.producer(), node)
    return node.outputs[0]


def _copy_weights(value: Any, dtype: Any, graph: Any) -> Any:
    ir = require("onnx_ir", extra="cpu")
    copy = ir.val(f"{value.name}.{dtype.name.lower()}", const_value=_rounded(value.const_value, dtype))
    graph.register_initializer(copy)
    return copy


def _rounded(tensor: Any, dtype: Any) -> Any:
    """`tensor` as `dtype`, computed when it is written, so that the weights need not fit in memory twice."""
    ir = require("onnx_ir", extra="cpu")
    return ir.LazyTensor(lambda: ir.tensor(tensor.numpy().astype(dtype.numpy())), dtype=dtype, shape=tensor.shape)


def _values_beyond_float16(source: Path, samples: Tensor) -> set[str]:
    """Names of the float32 values in the main graph of `source` that float16 cannot hold."""
    model = _load(source, "fp16")
    largest: dict[str, float] = {}
    for value in model.graph.initializers.values():
        if _is_float32(value):
            largest[value.name] = _largest_finite(value.const_value.numpy())
    nodes = tuple(model.graph)
    values = [*model.graph.inputs, *(value for node in nodes for value in node.outputs)]
    floats = [value for value in values if _is_float32(value)]
    _return_largest(model, floats)
    for magnitudes in _run(model, samples, source):
        for value, magnitude in zip(floats, magnitudes, strict=True):
            largest[value.name] = max(largest.get(value.name, 0.0), magnitude.item())
    tiny = {name for name, magnitude in largest.items() if 0 < magnitude < _SMALLEST}
    # What is added against zero is of use only if whoever reads the sum does so in float32.
    guarded = {
        output.name
        for node in nodes
        if any(_is_float32(value) and value.name in tiny for value in node.inputs)
        for output in node.outputs
    }
    return tiny | guarded | {name for name, magnitude in largest.items() if magnitude > _LARGEST}


def _largest_finite(weights: np.ndarray[Any, Any]) -> float:
    # Weights beside the file are mapped; onnx_ir unmaps them when it saves, so that no array may outlive this call.
    return float(np.abs(weights).max(initial=0.0, where=np.isfinite(weights)))


def _return_largest(model: Any, values: Sequence[Any]) -> None:
    """Let `model` return the largest finite magnitude of each of `values`, and nothing else."""
    ir = require("onnx_ir", extra="cpu")
    zero = add_constant(model, "kd_pipeline.zero", np.zeros((), np.float32))
    model.graph.outputs.clear()
    for index, value in enumerate(values):
        magnitude, infinite = ir.node("Abs", [value]), ir.node("IsInf", [value])
        finite = ir.node("Where", [*infinite.outputs, zero, *magnitude.outputs])
        output = ir.val(f"kd_pipeline.largest.{index}", ir.DataType.FLOAT, [])
        largest = ir.node("ReduceMax", finite.outputs, {"keepdims": 0}, outputs=[output])
        model.graph.extend([magnitude, infinite, finite, largest])
        model.graph.outputs.append(output)


def _run(model: Any, samples: Tensor, source: Path) -> list[list[Any]]:
    """The outputs of `model` for each batch of `samples`."""
    name = model.graph.inputs[0].name
    with tempfile.TemporaryDirectory(prefix="kd-pipeline-") as folder:
        file = Path(folder, "ranges.onnx")
        require("onnx_ir", extra="cpu").save(model, file, external_data="weights")
        try:
            session = open_session(file, log_level=FATAL)
            return [session.run(None, {name: images.numpy()}) for images in torch.split(samples, _BATCH_SIZE)]
        except Exception as exc:
            raise EngineError(f"ONNX Runtime cannot run {source} on {len(samples)} samples: {exc}") from exc
