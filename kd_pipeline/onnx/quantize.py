"""Quantization of an ONNX teacher to int8 or fp8 with explicit Q/DQ nodes, calibrated on real images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.optional import require
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.edit import add_constant, open_model, save_model
from kd_pipeline.onnx.file import OnnxFile, read_onnx
from kd_pipeline.onnx.ranges import measure_ranges

__all__ = ["QUANTIZER_VERSION", "quantize_onnx"]

QUANTIZER_VERSION = 1
"""Of what `quantize_onnx` writes for the same input; a file that another version has quantized is made again."""

Runtime = Literal["tensorrt", "openvino", "onnxruntime"]

_MAX_VALUE = {"int8": 127.0, "fp8": 448.0}
"""Largest magnitude of the quantized type; int8 leaves out -128, to be symmetric."""
_MIN_OPSET = {"int8": 13, "fp8": 19}
"""First opset with per-channel QuantizeLinear, and with float8."""
_UNSIGNED_MAX = 255.0
"""Largest value of uint8, for activations that are never negative."""
_DTYPES = {"int8": "INT8", "uint8": "UINT8", "fp8": "FLOAT8E4M3FN"}
_OP_TYPES = ("Conv", "Gemm", "MatMul")
_FP8_CHANNELS, _FP8_KERNEL = 16, 32
"""TensorRT's float8 convolutions need channels in multiples of 16, and kernels of at most 32 elements."""


def quantize_onnx(
    source: Path,
    target: Path,
    precision: Literal["int8", "fp8"],
    samples: Tensor,
    *,
    runtime: Runtime = "tensorrt",
) -> Path:
    """Write the float32 teacher `source` with quantized layers to `target`, which may be the same file.

    Every Conv, Gemm and MatMul with constant weights gets a QuantizeLinear/DequantizeLinear pair on its activation and
    on its weights: symmetric, per tensor for activations and per output channel for weights. Biases, the rest of the
    graph, inputs and outputs stay in float32. The CPU runtimes fuse more if more is rounded: there activations that are
    never negative are uint8, a pair is before a MaxPool rather than after it, and summands of a sum that a quantized
    layer reads have pairs too. For OpenVINO one of two does, as it adds that one to what a convolution computes. ONNX
    Runtime needs both, one after each convolution, and biases in int32.

    In float32 stay

    - the layer that computes the logits, because the student learns from them; in a file without logits the last layer
      before each output, unless a sum of two branches is in between, as after a residual block;
    - products of two activations, as in attention;
    - for fp8, convolutions without float8 kernels in TensorRT.

    Run an fp8 file in ONNX Runtime at `ORT_ENABLE_BASIC` at most. Above it, the runtime fuses layers that it has no
    kernels for or, with `session.disable_quant_qdq`, drops each ReLU before a Q, which makes the outputs wrong.

    Args:
        source: a float32 teacher that `read_onnx` accepts.
        target: the file to write; an existing one is replaced, missing folders are created.
        precision: `"int8"`, or `"fp8"` in E4M3.
        samples: `[N, 3, H, W]` training images, 100 or more; they determine the range of each activation.
        runtime: which runtime runs the file, on a CPU if it is not TensorRT.

    Raises:
        EngineError: the file is not float32, has nothing to quantize, an opset that is too old or values that are not
            finite, or the samples do not match; `target` is unchanged.
        TeacherError: `source` is not a teacher in ONNX.
        MissingPackageError: `onnx`, `onnx_ir` or `onnxruntime` is not installed.
    """
    file = read_onnx(source)
    _check_source(file, precision, samples)
    with open_model(file) as model:
        layers = _find_layers(model.graph, file, precision)
        if not layers:
            raise EngineError(
                f"{file.path} has no {', '.join(_OP_TYPES)} with constant float32 weights before its last layer that "
                f"could run in {precision}; build it in another precision"
            )
        activations = _activations(model.graph, layers, runtime)
        largest = _calibrate(file, {node.inputs[position].name for node, position in activations}, samples)
        quantizer = _Quantizer(model, precision, runtime, largest)
        for node, position in activations:
            quantizer.quantize_activation(node, position)
        for layer in layers:
            quantizer.quantize_weight(layer)
            if runtime == "onnxruntime":
                quantizer.quantize_bias(layer)
        return save_model(model, target)


def _check_source(file: OnnxFile, precision: str, samples: Tensor) -> None:
    if file.precision != "fp32":
        raise EngineError(
            f"{file.path} has {file.precision} weights; {precision} is quantized from a float32 file, export one"
        )
    if file.opset < _MIN_OPSET[precision]:
        raise EngineError(
            f"{file.path} has opset {file.opset}, and {precision} needs {_MIN_OPSET[precision]} or later; export it "
            "again"
        )
    shape = tuple(samples.shape)
    if not len(samples) or not file.images.accepts(shape, samples.dtype):
        raise EngineError(
            f"{file.path} takes images {file.images}, and the samples are {TensorSpec(shape, samples.dtype)}"
        )
    if not samples.isfinite().all():  # ONNX Runtime's ReduceMax skips NaN
        raise EngineError("the samples contain NaN or inf; check the images that they were made from")


def _find_layers(graph: Any, file: OnnxFile, precision: str) -> list[Any]:
    """The nodes to quantize, in graph order."""
    # Measured on a small ResNet and a small ViT trained on digits, 3 sets of 128 samples each: the error of the logits
    # was 1.3 % and 1.2 % of their root mean square in int8, 4.0 % and 3.4 % in fp8. Quantizing the last layer too added
    # 4 to 18 % to that error, and the products in attention 15 to 145 %.
    ir = require("onnx_ir", extra="cpu")
    last = _last_layers(graph, file.output_names)

    def is_quantizable(node: Any) -> bool:
        if node.op_type not in _OP_TYPES or node.domain or node in last:
            return False
        activation, weight = (ir.convenience.get_const_tensor(value) for value in node.inputs[:2])
        if activation is not None or weight is None or weight.dtype != ir.DataType.FLOAT:
            return False
        if precision == "int8" or node.op_type != "Conv":
            return True
        num_out, num_in, *kernel = map(int, weight.shape)
        return num_out % _FP8_CHANNELS == num_in % _FP8_CHANNELS == 0 and math.prod(kernel) <= _FP8_KERNEL

    return [node for node in graph if is_quantizable(node)]


def _last_layers(graph: Any, output_names: Mapping[str, str]) -> set[Any]:
    """The layers with no other layer between them and the logits; most models have one.

    Without logits, those before any output. There it ends at a sum, since each block of a residual network adds to it.
    """
    logits = output_names.get("logits")
    found: set[Any] = set()
    seen: set[Any] = set()
    pending = [value for value in graph.outputs if logits in (None, value.name)]
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _OP_TYPES:
            found.add(node)
        elif logits is not None or not _is_sum(node):
            pending.extend(value for value in node.inputs if value is not None)
    return found


def _is_sum(node: Any) -> bool:
    """Whether it adds two activations."""
    if node.op_type != "Add" or node.domain:
        return False
    get_constant = require("onnx_ir", extra="cpu").convenience.get_const_tensor
    return all(get_constant(value) is None for value in node.inputs)


def _activations(graph: Any, layers: Sequence[Any], runtime: Runtime) -> list[tuple[Any, int]]:
    """The activations to quantize, each as a node that reads it and the position among its inputs."""
    # Measured with ResNet-50 on a CPU with AMX, as multiples of the same runtime: with pairs at the layers alone,
    # OpenVINO ran at 0.76 of bfloat16's speed and ONNX Runtime, with all convolutions in float32, at 0.53 of float32's;
    # with these pairs at 1.9 of bfloat16's and 2.9 of float32's.
    places = [(layer, 0) for layer in layers]
    if runtime == "tensorrt":
        return places
    places = [_before_pools(*place) for place in places]
    for layer in layers:
        if (addition := _addition_before(layer)) is not None:
            fused = _fused_input(addition, layers) if runtime == "openvino" else None
            places += [(addition, position) for position in (0, 1) if position != fused]
    if runtime == "onnxruntime":
        places += [use for layer in layers if layer.op_type == "Conv" for use in _uses_of_output(layer)]
    order = {node: index for index, node in enumerate(graph)}
    return sorted(dict.fromkeys(places), key=lambda place: (order[place[0]], place[1]))


def _before_pools(node: Any, position: int) -> tuple[Any, int]:
    """The input of the poolings before an input: the maximum of rounded numbers is a rounded number."""
    while (producer := node.inputs[position].producer()) is not None and producer.op_type == "MaxPool":
        node, position = producer, 0
    return node, position


def _addition_before(layer: Any) -> Any | None:
    """The sum of two activations that `layer` reads, through activation functions and poolings or not."""
    node = layer.inputs[0].producer()
    while node is not None and node.op_type in ("Relu", "MaxPool"):
        node = node.inputs[0].producer()
    return node if node is not None and _is_sum(node) else None


def _fused_input(addition: Any, layers: Sequence[Any]) -> int | None:
    """The position of the summand that the last convolution computes: it adds the other one before it rounds."""
    order = {node: index for index, node in enumerate(layers) if node.op_type == "Conv"}
    candidates = [
        (order[value.producer()], position)
        for position, value in enumerate(addition.inputs)
        if value.producer() in order and len(value.uses()) == 1
    ]
    return max(candidates)[1] if candidates else None


def _uses_of_output(layer: Any) -> list[tuple[Any, int]]:
    """The nodes that read a convolution, after the Relu that is fused with it, and at which of their inputs."""
    value = layer.outputs[0]
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Relu":
        value = uses[0].node.outputs[0]
    if value.is_graph_output():  # it is needed in float32
        return []
    return [(use.node, use.idx) for use in value.uses() if use.node.graph is layer.graph]


def _is_never_negative(value: Any) -> bool:
    """Whether no image makes an element of `value` negative."""
    node = value.producer()
    while node is not None and node.op_type == "MaxPool":
        node = node.inputs[0].producer()
    return node is not None and node.op_type in ("Relu", "Sigmoid", "HardSigmoid", "Softmax")


def _calibrate(file: OnnxFile, names: set[str], samples: Tensor) -> Mapping[str, np.float32]:
    """The largest magnitude of each of the tensors `names` on the samples."""
    # On the digits, ranges chosen by entropy gave the same error, and the 99.99th percentile an error between 6 %
    # smaller and 8 % larger. The maximum needs no histograms and clips nothing on the samples.
    with open_model(file) as model:
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        values = [value for value in values if value.name in names]
        ranges = measure_ranges(file, model, values, samples)
    return {value.name: largest for value, largest in zip(values, ranges, strict=True)}


class _Quantizer:
    """Inserts Q/DQ pairs into a model; the readers of one tensor share a pair."""

    def __init__(self, model: Any, precision: str, runtime: Runtime, largest: Mapping[str, np.float32]) -> None:
        self._model, self._precision, self._largest = model, precision, largest
        self._has_unsigned = runtime != "tensorrt"
        self._pairs: dict[tuple[str, int | None], Any] = {}
        self._scales: dict[Any, NDArray[np.float32]] = {}

    def quantize_activation(self, node: Any, position: int) -> None:
        """Insert Q/DQ before an input of `node`."""
        value = node.inputs[position]
        is_unsigned = self._has_unsigned and _is_never_negative(value)
        self._insert(node, position, None, self._largest[value.name], is_unsigned)

    def quantize_weight(self, layer: Any) -> None:
        """Insert Q/DQ before the weight of `layer`, with a scale for each output channel."""
        weight = require("onnx_ir", extra="cpu").convenience.get_const_tensor(layer.inputs[1])
        magnitude = np.abs(weight.numpy())
        channel = _channel_axis(layer, magnitude.ndim)
        per_channel = magnitude.max(axis=tuple(axis for axis in range(magnitude.ndim) if axis != channel))
        self._insert(layer, 1, channel, per_channel, False)

    def quantize_bias(self, layer: Any) -> None:
        """Give `layer` its constant bias in int32, in units of the products of both scales."""
        ir = require("onnx_ir", extra="cpu")
        scales = [self._scales.get(value) for value in layer.inputs[:2]]
        bias = None if len(layer.inputs) < 3 else ir.convenience.get_const_tensor(layer.inputs[2])
        if bias is None or scales[0] is None or scales[1] is None or bias.numpy().shape != scales[1].shape:
            return
        scale = np.asarray(scales[0] * scales[1], np.float32)
        rounded = np.rint(bias.numpy().astype(np.float64) / scale)
        if (scale < np.finfo(np.float32).tiny).any() or np.abs(rounded).max(initial=0) > np.iinfo(np.int32).max:
            return
        name = f"{layer.inputs[2].name}.quantize.{layer.name}"
        inputs = [
            add_constant(self._model, name, rounded.astype(np.int32)),
            add_constant(self._model, f"{name}.scale", scale),
            add_constant(self._model, f"{name}.zero_point", np.zeros(scale.shape, np.int32)),
        ]
        node = ir.node("DequantizeLinear", inputs, {"axis": 0})
        self._model.graph.insert_before(layer, [node])
        layer.replace_input_with(2, node.outputs[0])

    def _insert(
        self, node: Any, position: int, axis: int | None, largest: np.float32 | NDArray[np.float32], is_unsigned: bool
    ) -> None:
        value = node.inputs[position]
        if (value.name, axis) not in self._pairs:
            levels = _UNSIGNED_MAX if is_unsigned else _MAX_VALUE[self._precision]
            scale = _scale(value, largest, levels)
            pair = _qdq_pair(self._model, value, axis, scale, "uint8" if is_unsigned else self._precision)
            self._model.graph.insert_before(node, pair)
            self._pairs[value.name, axis] = pair[-1].outputs[0]
            self._scales[pair[-1].outputs[0]] = scale
        node.replace_input_with(position, self._pairs[value.name, axis])


def _channel_axis(layer: Any, num_axes: int) -> int:
    """The axis of the output channels in a layer's weights."""
    if layer.op_type == "Conv" or ("transB" in layer.attributes and layer.attributes["transB"].as_int()):
        return 0
    return num_axes - 1


def _scale(value: Any, largest: np.float32 | NDArray[np.float32], levels: float) -> NDArray[np.float32]:
    """The step between two levels of `value`, whose largest magnitude is `largest`."""
    if not np.isfinite(largest).all():
        raise EngineError(f"{value.name!r} contains NaN or inf; check the teacher's weights")
    scale = np.asarray(largest / levels, np.float32)
    # Any scale suits a dead channel, which is all zeros, but TensorRT needs a positive one.
    return np.asarray(np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale))


def _qdq_pair(model: Any, value: Any, axis: int | None, scale: NDArray[np.float32], dtype_name: str) -> list[Any]:
    """QuantizeLinear and DequantizeLinear for `value`, with one `scale` or one for each index of `axis`."""
    ir = require("onnx_ir", extra="cpu")
    dtype = _DTYPES[dtype_name]
    name = f"{value.name}.quantize" if axis is None else f"{value.name}.quantize.axis{axis}"
    parameters = [
        add_constant(model, f"{name}.scale", scale),
        add_constant(model, f"{name}.zero_point", np.zeros(scale.shape, ir.DataType[dtype].numpy())),
    ]
    attributes = {} if axis is None else {"axis": axis}
    quantize = ir.node("QuantizeLinear", [value, *parameters], attributes)
    return [quantize, ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], attributes)]
