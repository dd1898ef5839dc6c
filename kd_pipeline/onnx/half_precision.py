"""Converts an ONNX teacher to float16 or bfloat16, and emulates that arithmetic in float32."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.edit import open_model, save_model
from kd_pipeline.onnx.file import OnnxFile, read_onnx
from kd_pipeline.onnx.ranges import measure_ranges
from kd_pipeline.onnx.weights import shortened

__all__ = ["CONVERTER_VERSION", "convert_precision", "emulate_precision"]

CONVERTER_VERSION = 1
"""Part of an engine's key; increase it whenever the output of this module changes."""

_MAX_FLOAT16 = 65504 / 4
"""Largest magnitude to convert to float16: a quarter of its maximum, because images outside the samples may exceed it.
"""
_MIN_FLOAT16 = 2**-24
"""Smallest positive float16; a smaller epsilon becomes 0, and no longer prevents a division by zero."""
_NOT_IN_TENSORRT = {
    "fp16": {"Celu", "LSTM", "MeanVarianceNormalization"},
    "bf16": {"Celu", "GRU", "HardSwish", "LSTM", "LpNormalization", "LpPool", "MeanVarianceNormalization", "Mish"},
}
"""Operators that ONNX has in half precision and TensorRT-RTX 1.7's parser does not, found with ONNX's test cases."""
_BFLOAT16_OPSET = 13
"""First opset with bfloat16 in Cast."""
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}

_Precision = Literal["fp16", "bf16"]


def convert_precision(
    source: Path, target: Path, precision: _Precision, samples: Tensor, *, half_io: bool = False
) -> tuple[str, ...]:
    """Write the float32 teacher `source` with weights and arithmetic in half precision to `target`.

    TensorRT's strongly typed networks take their precision from such a file. Inputs and outputs keep their names and
    stay float32, with a Cast at each. Metadata and opset are unchanged: ONNX has bfloat16 in few operators before
    opset 22, but TensorRT accepts it. These nodes stay in float32:

    - for `"fp16"`, those that read or write a value that float16 cannot hold: its largest finite magnitude, in the
      weights or on `samples`, is above 65504 / 4, or underflows to zero. Infinities are exact in float16. Nodes that
      read a sum with such a small number, an epsilon, also stay in float32;
    - those that compute with sizes and indices only, which half precision would round;
    - those with subgraphs (`If`, `Loop`, `Scan`), and all nodes in them;
    - operators that ONNX or TensorRT lacks in this precision, and `QuantizeLinear` and `DequantizeLinear`.

    Args:
        source: a float32 teacher that `read_onnx` accepts.
        target: the file to write; an existing one is replaced, missing folders are created.
        precision: dtype of weights and arithmetic.
        samples: `[N, 3, H, W]` float32 training images, on which ONNX Runtime measures the range of every value for
            `"fp16"`. `"bf16"` has the range of float32.
        half_io: whether images are float16, in either precision; outputs are float32 regardless.

    Returns:
        Names of the nodes that stay in float32, in graph order, without quantizers.

    Raises:
        EngineError: the file is not float32, or has custom operators or an opset without bfloat16, or `samples` do not
            match; `target` is unchanged.
        TeacherError: `source` is not a teacher in ONNX.
        MissingPackageError: `onnx`, `onnx_ir` or `onnxruntime` is not installed.
    """
    dtypes = require("onnx_ir", extra="cpu").DataType
    file = _read_float32(source, samples)
    if precision == "bf16" and file.opset < _BFLOAT16_OPSET:
        raise EngineError(
            f"{source} has opset {file.opset}, and bfloat16 needs {_BFLOAT16_OPSET} or later; export the teacher again"
        )
    out_of_range = _values_out_of_range(file, samples) if precision == "fp16" else set()
    half = dtypes.FLOAT16 if precision == "fp16" else dtypes.BFLOAT16
    with _open_prepared(file) as model:
        reads: set[tuple[Any, int]] = set()
        writes: list[Any] = []
        for node in _convertible_nodes(model.graph, out_of_range, _NOT_IN_TENSORRT[precision]):
            inputs, outputs = _half_ports(node, half, file.opset)
            reads.update((node, index) for index in inputs)
            writes += outputs
        converted = {node for node, _ in reads} | {value.producer() for value in writes}
        kept = tuple(node.name for node in model.graph if node not in converted and _computes_in_float32(node))
        _insert_casts(model.graph, half, reads, writes, dtypes.FLOAT16 if half_io else dtypes.FLOAT)
        require("onnx_ir.passes.common", extra="cpu").RemoveUnusedNodesPass()(model)
        save_model(model, target)
    return kept


def emulate_precision(source: Path, target: Path) -> Path:
    """Write a file of `convert_precision` in float32, with every result rounded to half precision, to `target`.

    Each value in half precision is computed in float32, then cast to half precision and back. With its optimizer off,
    ONNX Runtime performs these Casts exactly. It cannot run `source` faithfully: its CPU provider lacks most operators
    in bfloat16, and it widens and fuses float16, which hides an overflow. Inputs and outputs are those of `source`.

    Returns:
        `target`.

    Raises:
        EngineError: `target` cannot be written.
        TeacherError: `source` is not a teacher in ONNX.
        MissingPackageError: `onnx` or `onnx_ir` is not installed.
    """
    ir = require("onnx_ir", extra="cpu")
    halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    with open_model(read_onnx(source)) as model:
        _emulate(model.graph, halves)
        return save_model(model, target)


def _emulate(graph: Any, halves: Collection[Any]) -> None:
    """Compute all values of the dtypes `halves` in float32, each rounded by a Cast."""
    ir = require("onnx_ir", extra="cpu")
    for weights in graph.initializers.values():
        if weights.dtype in halves:
            weights.const_value = _round(weights.const_value, ir.DataType.FLOAT)
            weights.type = ir.TensorType(ir.DataType.FLOAT)
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.dtype not in halves:
            continue
        uses, node, half = value.uses(), value.producer(), value
        if node is not None and node.op_type != "Cast":  # a Cast already rounds
            half = _cast(value, value.dtype, graph)
            _set_dtype(value, ir.DataType.FLOAT)
        widened = _cast(half, ir.DataType.FLOAT, graph)
        for user, index in uses:
            user.replace_input_with(index, widened)


def _read_float32(path: Path, samples: Tensor) -> OnnxFile:
    file = read_onnx(path)
    if not file.images.accepts(tuple(samples.shape), samples.dtype):
        found = TensorSpec(tuple(samples.shape), samples.dtype)
        raise EngineError(f"{path} takes images {file.images}, and the samples are {found}")
    specs = {file.input_name: file.images, **file.outputs}
    others = [f"{name!r} is {spec}" for name, spec in specs.items() if spec.dtype != torch.float32]
    if file.precision != "fp32" or others:
        reasons = ", ".join([f"its weights are {file.precision}", *others])
        raise EngineError(f"{path} is not in float32: {reasons}; export the teacher in float32 and convert that")
    return file


@contextmanager
def _open_prepared(file: OnnxFile) -> Iterator[Any]:
    """The model with functions inlined, constants as initializers, a name for each node and all dtypes inferred."""
    passes = require("onnx_ir.passes.common", extra="cpu")
    steps = (
        passes.InlinePass(),
        passes.RemoveInitializersFromInputsPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.NameFixPass(),
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False),
    )
    with open_model(file) as model:
        try:
            for step in steps:
                step(model)
        except Exception as exc:  # such as functions that call themselves
            raise EngineError(f"{file.path} cannot be converted: {shortened(exc)}; export the teacher again") from exc
        for node in model.graph.all_nodes():
            _check_node(node, file.path)
        yield model


def _check_node(node: Any, path: Path) -> None:
    defs = require("onnx", extra="cpu").defs
    if node.domain or not defs.has(node.op_type):
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise EngineError(
            f"{path}: node {node.name!r} is {name}, which is not an ONNX operator; custom ops cannot be converted, "
            "export the teacher without it"
        )
    parameters = defs.get_schema(node.op_type).outputs
    for index, value in enumerate(node.outputs):
        is_tensor = any(name.startswith("tensor(") for name in _nth(parameters, index).types)
        if value.name and (value.dtype is None or not is_tensor):
            reason = "of an unknown dtype" if is_tensor else "not a tensor"
            raise EngineError(
                f"{path}: {value.name!r}, the output of node {node.name!r} ({node.op_type}), is {reason}; only tensors "
                "can be converted, export the teacher without it"
            )


def _values_out_of_range(file: OnnxFile, samples: Tensor) -> set[str]:
    """Names of the float32 values in the main graph that float16 cannot hold."""
    with _open_prepared(file) as model:
        largest = {
            value.name: _largest_finite(value.const_value.numpy())
            for value in model.graph.initializers.values()
            if _is_float32(value)
        }
        nodes = tuple(model.graph)
        values = [*model.graph.inputs, *(value for node in nodes for value in node.outputs)]
        values = [value for value in values if _is_float32(value)]
        ranges = measure_ranges(file, model, values, samples, finite_only=True)
    largest |= {value.name: magnitude.item() for value, magnitude in zip(values, ranges, strict=True)}
    tiny = {name for name, magnitude in largest.items() if 0 < magnitude < _MIN_FLOAT16}
    # An epsilon has an effect only if the nodes that read the sum are in float32 too.
    sums = {
        output.name
        for node in nodes
        if any(_is_float32(value) and value.name in tiny for value in node.inputs)
        for output in node.outputs
    }
    return tiny | sums | {name for name, magnitude in largest.items() if magnitude > _MAX_FLOAT16}


def _largest_finite(weights: np.ndarray[Any, Any]) -> float:
    # A function of its own: external weights are memory-mapped until onnx_ir saves, so no array may outlive this call.
    return float(np.abs(weights).max(initial=0.0, where=np.isfinite(weights)))


def _is_float32(value: Any) -> bool:
    return value is not None and value.dtype is not None and value.dtype.name == "FLOAT"


def _float32_values(node: Any) -> Iterator[Any]:
    """The float32 inputs and outputs of a node."""
    return (value for value in (*node.inputs, *node.outputs) if _is_float32(value))


def _has_subgraph(node: Any) -> bool:
    return any(attribute.type.name in {"GRAPH", "GRAPHS"} for attribute in node.attributes.values())


def _computes_in_float32(node: Any) -> bool:
    return node.op_type not in {"Cast", *_QUANTIZERS} and (_has_subgraph(node) or any(_float32_values(node)))


def _convertible_nodes(graph: Any, out_of_range: Collection[str], float32_only: Collection[str]) -> Iterator[Any]:
    """The nodes that can run in half precision, without the values `out_of_range` and the operators `float32_only`."""
    sizes: set[Any] = set()  # float32 values computed from sizes and indices only
    for node in graph:
        inputs = [value for value in node.inputs if _is_float32(value)]
        if node.op_type == "Cast":
            if node.inputs[0].dtype.is_integer():
                sizes.update(node.outputs)
        elif not sizes.isdisjoint(inputs) and all(value in sizes or value.is_initializer() for value in inputs):
            sizes.update(node.outputs)
        elif not (
            node.op_type in _QUANTIZERS
            or node.op_type in float32_only
            or _has_subgraph(node)
            or any(value.name in out_of_range for value in _float32_values(node))
        ):
            yield node


def _half_ports(node: Any, half: Any, opset: int) -> tuple[Sequence[int], Sequence[Any]]:
    """The inputs of `node`, by index, and the outputs whose dtype becomes `half`.

    An input does if the newest version of the operator allows it, since ONNX has bfloat16 in most operators only from
    opset 22 on. An output does if its type is that of such an input.
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
    """The parameter at `index` of an operator, whose last one may be variadic."""
    return parameters[min(index, len(parameters) - 1)]


def _insert_casts(
    graph: Any, half: Any, reads: Collection[tuple[Any, int]], writes: Sequence[Any], images: Any
) -> None:
    """Set the dtype of `writes` to `half` and of the input to `images`, and cast what each node reads."""
    ir = require("onnx_ir", extra="cpu")
    # Listed before any dtype changes. The file's own Casts read any dtype.
    float32_reads = [
        (node, index)
        for node in graph.all_nodes()
        for index, value in enumerate(node.inputs)
        if node.op_type != "Cast" and _is_float32(value)
    ]
    graph.inputs[0].type = ir.TensorType(images)
    for value in writes:
        _set_dtype(value, half)
    casts: dict[tuple[Any, Any], Any] = {}
    for node, index in float32_reads:
        dtype = half if (node, index) in reads else ir.DataType.FLOAT
        node.replace_input_with(index, _as_dtype(node.inputs[index], dtype, graph, casts))
    for index, value in enumerate(graph.outputs):
        if value.dtype == half:
            name, value.name = value.name, f"{value.name}.{half.name.lower()}"
            graph.outputs[index] = _as_dtype(value, ir.DataType.FLOAT, graph, casts)
            graph.outputs[index].name = name


def _set_dtype(value: Any, dtype: Any) -> None:
    """Change the dtype of a node's output. It follows from the inputs, except for ConstantOfShape."""
    ir = require("onnx_ir", extra="cpu")
    value.type = ir.TensorType(dtype)
    node = value.producer()
    if node.op_type == "ConstantOfShape":
        fill = node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor([0.0])
        node.attributes["value"] = ir.AttrTensor("value", _round(fill, dtype))


def _as_dtype(value: Any, dtype: Any, graph: Any, casts: dict[tuple[Any, Any], Any]) -> Any:
    """`value` as `dtype`: itself, or a Cast or a copy of the weights that all consumers share through `casts`."""
    while value.dtype != dtype and (producer := value.producer()) is not None and producer.op_type == "Cast":
        value = producer.inputs[0]  # cast its input instead, to round once
    if value.dtype == dtype:
        return value
    if (value, dtype) not in casts:
        casts[value, dtype] = (_copy_weights if value.is_initializer() else _cast)(value, dtype, graph)
    return casts[value, dtype]


def _cast(value: Any, dtype: Any, graph: Any) -> Any:
    """The output of a new Cast, inserted after the node that computes `value`."""
    ir = require("onnx_ir", extra="cpu")
    node = ir.node("Cast", [value], {"to": dtype}, outputs=[ir.Value(shape=value.shape, type=ir.TensorType(dtype))])
    if value.producer() is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(value.producer(), node)
    return node.outputs[0]


def _copy_weights(value: Any, dtype: Any, graph: Any) -> Any:
    ir = require("onnx_ir", extra="cpu")
    copy = ir.val(f"{value.name}.{dtype.name.lower()}", const_value=_round(value.const_value, dtype))
    graph.register_initializer(copy)
    return copy


def _round(tensor: Any, dtype: Any) -> Any:
    """`tensor` as `dtype`, computed lazily when it is saved, so weights need not be in memory twice."""
    ir = require("onnx_ir", extra="cpu")
    return ir.LazyTensor(lambda: ir.tensor(tensor.numpy().astype(dtype.numpy())), dtype=dtype, shape=tensor.shape)
