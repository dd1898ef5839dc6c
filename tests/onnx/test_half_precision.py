import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper, parser
from torch import Tensor

from kd_pipeline.errors import EngineError
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.half_precision import convert_precision, emulate_precision
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, random_images, vit_backbone
from tests.onnx.engines import assert_builds

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
HALF_TYPE = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
PRECISIONS = sorted(HALF)
SHAPE = (3, 4, 4)
"""Shape of the images of the graphs below; `[N, 48]` after Flatten."""

GRAPHS = {
    "plain": "flat = Flatten(images) logits = Relu(flat)",
    "overflow": """flat = Flatten(images) large = Constant<value_float=100000.0>()
        [up] product = Mul(flat, large) [down] quotient = Div(product, large) logits = Relu(quotient)""",
    "epsilon": """flat = Flatten(images) tiny = Constant<value_float=1e-9>() size = Abs(flat)
        [nudge] nudged = Add(size, tiny) [log] logits = Log(nudged)""",
    "mask": """flat = Flatten(images) lowest = Constant<value_float=-3.4028234e38>() zero = Constant<value_float=0.0>()
        some = Greater(flat, zero) [choose] bias = Where(some, zero, lowest) [add] masked = Add(flat, bias)
        [norm] logits = Softmax(masked)""",
    "infinite mask": """flat = Flatten(images) zero = Constant<value_float=0.0>() one = Constant<value_float=1.0>()
        some = Greater(flat, zero) lowest = Log(zero) bias = Where(some, zero, lowest) masked = Add(flat, bias)
        logits = Softmax(masked)""",
    "sizes": """flat = Flatten(images) shape = Shape(flat) sizes = Cast<to=1>(shape)
        odd = Constant<value_float=4097.0>() [scale] scaled = Mul(sizes, odd)
        [rest] rests = Mod<fmod=1>(scaled, odd) [sum] total = ReduceSum(rests) logits = Add(flat, total)""",
    "comparison": """flat = Flatten(images) half = Constant<value_float=0.5>() over = Greater(flat, half)
        weight = Cast<to=1>(over) logits = Mul(flat, weight)""",
    "fill": """flat = Flatten(images) shape = Shape(flat) two = ConstantOfShape<value=float[1] {2.5}>(shape)
        zeros = ConstantOfShape(shape) sum = Add(flat, two) logits = Add(sum, zeros)""",
    "resize": """scales = Constant<value_floats=[1.0, 1.0, 2.0, 2.0]>()
        doubled = Resize<mode="linear">(images, , scales)
        pooled = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(doubled) logits = Flatten(pooled)""",
    "branch": """flat = Flatten(images) lower = Neg(flat) yes = Constant<value=bool {1}>()
        [choose] chosen = If(yes)<then_branch = one () => (float[n, 48] sum) { sum = Add(lower, flat) },
        else_branch = other () => (float[n, 48] same) { same = Identity(lower) }> logits = Neg(chosen)""",
    "loop": """flat = Flatten(images) lower = Neg(flat) times = Constant<value=int64 {3}>()
        yes = Constant<value=bool {1}>() [repeat] sum = Loop(times, yes, lower)
        <body = once (int64 step, bool go, float[n, 48] before) => (bool on, float[n, 48] after)
        { on = Identity(go) after = Add(before, lower) }> logits = Neg(sum)""",
    "hard swish": "flat = Flatten(images) [swish] swished = HardSwish(flat) logits = Neg(swished)",
    "quantized": """flat = Flatten(images) scale = Constant<value_float=0.05>() zero = Constant<value=int8 {0}>()
        lower = Neg(flat) codes = QuantizeLinear(lower, scale, zero) coarse = DequantizeLinear(codes, scale, zero)
        logits = Neg(coarse)""",
}
KEPT = {
    ("overflow", "fp16"): ("up", "down"),
    ("epsilon", "fp16"): ("nudge", "log"),
    ("mask", "fp16"): ("choose", "add", "norm"),
    ("sizes", "fp16"): ("scale", "rest", "sum"),
    ("sizes", "bf16"): ("scale", "rest", "sum"),
    ("branch", "fp16"): ("choose",),
    ("branch", "bf16"): ("choose",),
    ("loop", "fp16"): ("repeat",),
    ("loop", "bf16"): ("repeat",),
    ("hard swish", "bf16"): ("swish",),
}
"""Nodes that stay in float32, by graph and precision; none in the other graphs."""


def graph_file(path: Path, text: str, *, opset: int = 22, domains: str = "", functions: str = "") -> Path:
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n'
        f"classifier (float[n, 3, 4, 4] images) => (float[n, 48] logits) {{ {text} }}\n{functions}"
    )
    onnx.checker.check_model(model, full_check=not domains)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "convnet.onnx"
    return export_onnx(ConvNet(), path, image_shape=IMAGE_SHAPE, classes=CLASSES, opset=22)


@pytest.fixture
def convnet(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported, tmp_path))


@pytest.fixture(params=["convnet", *GRAPHS])
def source(request: pytest.FixtureRequest, convnet: Path, tmp_path: Path) -> Path:
    name: str = request.param
    return convnet if name == "convnet" else graph_file(tmp_path / f"{name}.onnx", GRAPHS[name])


def images_for(source: Path, num_images: int = 5) -> Tensor:
    return random_images(num_images, shape=IMAGE_SHAPE if source.stem == "convnet" else SHAPE)


def convert(source: Path, precision: Any, *, half_io: bool = False) -> tuple[Path, tuple[str, ...]]:
    target = source.with_suffix(f".{precision}.onnx")
    return target, convert_precision(source, target, precision, images_for(source), half_io=half_io)


def run_emulated(converted: Path, images: Tensor) -> dict[str, Tensor]:
    emulated = emulate_precision(converted, converted.with_suffix(".emulated.onnx"))
    return OnnxRuntimeTeacher(emulated, optimize=False)(images)


def inferred_types(path: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    """The graph of a file, and the dtype of each value as ONNX infers it, checked against the file."""
    model = onnx.load(path)
    noted = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {weights.name: weights.data_type for weights in graph.initializer}
    assert {name: types[name] for name in noted} == noted
    return graph, types


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "vit.onnx"
    return export_onnx(vit_backbone(), path, image_shape=IMAGE_SHAPE, max_batch=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_network_without_logits_keeps_its_outputs(backbone: Path, tmp_path: Path, precision: Any) -> None:
    images = random_images(5)
    target = tmp_path / "half.onnx"
    convert_precision(backbone, target, precision, images)
    assert read_onnx(target).outputs == read_onnx(backbone).outputs
    assert read_onnx(target).outputs["spatial"].num_prefix_tokens == 3
    found, wanted = run_emulated(target, images), OnnxRuntimeTeacher(backbone)(images)
    for name, output in found.items():
        assert 0 < (output - wanted[name]).abs().max() < 0.05 * wanted[name].abs().max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_returned_nodes_stay_in_float32(source: Path, precision: str) -> None:
    converted, kept = convert(source, precision)
    assert kept == KEPT.get((source.stem, precision), ())
    graph, types = inferred_types(converted)
    in_float32 = {
        node.name
        for node in graph.node
        if node.op_type not in {"Cast", "QuantizeLinear", "DequantizeLinear"}
        and TensorProto.FLOAT in {types[name] for name in (*node.input, *node.output) if name}
        and node.op_type != "Resize"  # its scales are always float32
    }
    assert in_float32 == set(kept)
    assert HALF_TYPE[precision] in types.values()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_casts_are_shared(source: Path, precision: str) -> None:
    graph = onnx.load(convert(source, precision)[0]).graph
    casts = {node.output[0]: (node.input[0], node.attribute[0].i) for node in graph.node if node.op_type == "Cast"}
    assert casts
    assert max(Counter(casts.values()).values()) == 1
    assert not [read for read, _ in casts.values() if read in casts]


@pytest.mark.parametrize("half_io", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_builds_engine(source: Path, precision: str, half_io: bool) -> None:
    assert_builds(convert(source, precision, half_io=half_io)[0])


@pytest.mark.parametrize("half_io", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_emulated_interface_and_error(source: Path, precision: str, half_io: bool) -> None:
    images = images_for(source)
    converted, _ = convert(source, precision, half_io=half_io)
    for path in (converted, emulate_precision(converted, source.with_suffix(".emulated.onnx"))):
        graph, original = onnx.load(path).graph, onnx.load(source).graph
        (found,) = graph.input
        assert found.name == "images"
        assert found.type.tensor_type.elem_type == (TensorProto.FLOAT16 if half_io else TensorProto.FLOAT)
        assert found.type.tensor_type.shape == original.input[0].type.tensor_type.shape
        assert [(value.name, value.type) for value in graph.output] == [
            (value.name, value.type) for value in original.output
        ]
    emulated = run_emulated(converted, images.half() if half_io else images)
    expected = OnnxRuntimeTeacher(source)(images)
    assert emulated.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        assert (emulated[name] - value).abs().max() <= 8 * torch.finfo(HALF[precision]).eps * largest


@pytest.mark.parametrize("precision", PRECISIONS)
def test_emulated_values_are_rounded(convnet: Path, tmp_path: Path, precision: str) -> None:
    converted, kept = convert(convnet, precision)
    assert kept == ()
    model = onnx.load(emulate_precision(converted, tmp_path / "emulated.onnx"))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    reads = {name for node in model.graph.node if node.op_type != "Cast" for name in node.input if name}
    del model.graph.output[:]
    values = sorted(reads - weights.keys())
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in values)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images_for(convnet).numpy()})
    arrays = dict(zip(values, found, strict=True)) | {name: weights[name] for name in reads & weights.keys()}
    floats = {name: torch.tensor(array) for name, array in arrays.items() if array.dtype == np.float32}
    assert len(floats) > 8
    for name, value in floats.items():
        assert torch.equal(value, value.to(HALF[precision]).float()), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_emulated_equals_module_in_half(convnet: Path, precision: str) -> None:
    dtype = HALF[precision]
    images = images_for(convnet, 64)
    emulated = run_emulated(convert(convnet, precision)[0], images)
    expected = ConvNet().eval().to(dtype)(images.to(dtype))
    for name, value in expected.items():
        # Sums are in a different order, so some values round to a neighbor. A float32 file agrees on almost none.
        assert (emulated[name] - value.float()).abs().max() <= 2 * torch.finfo(dtype).eps * value.abs().max()
        assert (emulated[name] == value.float()).float().mean() > 0.2


def test_overflow_is_emulated(tmp_path: Path) -> None:
    source, target = graph_file(tmp_path / "overflow.onnx", GRAPHS["overflow"]), tmp_path / "converted.onnx"
    images = images_for(source)
    assert convert_precision(source, target, "fp16", images) == ("up", "down")
    assert run_emulated(target, images)["logits"].isfinite().all()
    text = "flat = Flatten(images) [square] squares = Mul(flat, flat) [root] logits = Sqrt(squares)"
    source = graph_file(tmp_path / "squares.onnx", text)
    bright = torch.full_like(images, 300.0)
    assert convert_precision(source, target, "fp16", images) == ()
    assert run_emulated(target, bright)["logits"].isposinf().all()
    assert convert_precision(source, target, "fp16", bright) == ("square", "root")
    assert run_emulated(target, bright)["logits"].eq(300.0).all()


def test_float16_limit(tmp_path: Path) -> None:
    source = graph_file(tmp_path / "a.onnx", "[double] sum = Add(images, images) [flatten] logits = Flatten(sum)")
    target = tmp_path / "converted.onnx"
    images = torch.zeros(20, *SHAPE)
    images[19, 2, 3, 3] = -8188.0  # in the last image: all images count
    assert convert_precision(source, target, "fp16", images) == ()
    images[19, 2, 3, 3] = -8189.0
    kept = convert_precision(source, target, "fp16", images)
    assert kept == ("double", "flatten")
    assert convert_precision(source, target, "bf16", images) == ()


def test_epsilon_stays_in_float32(tmp_path: Path) -> None:
    source = graph_file(tmp_path / "epsilon.onnx", GRAPHS["epsilon"])
    converted, _ = convert(source, "fp16")
    logits = run_emulated(converted, torch.zeros(1, *SHAPE))["logits"]
    torch.testing.assert_close(logits, torch.full((1, 48), 1e-9).log())
    larger = graph_file(tmp_path / "larger.onnx", GRAPHS["epsilon"].replace("1e-9", "1e-7"))
    assert convert(larger, "fp16")[1] == ()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sizes_are_exact(tmp_path: Path, precision: str) -> None:
    source = graph_file(tmp_path / "sizes.onnx", GRAPHS["sizes"])
    images = torch.zeros(3, *SHAPE)
    assert run_emulated(convert(source, precision)[0], images)["logits"].eq(0).all()  # 4097 in half precision is 4096


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantizers_are_unchanged(tmp_path: Path, precision: str) -> None:
    converted, _ = convert(graph_file(tmp_path / "quantized.onnx", GRAPHS["quantized"]), precision)
    graph, types = inferred_types(converted)
    for node in graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            found = sorted(types[name] for name in (*node.input, *node.output))
            assert found == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8]


def test_bfloat16_keeps_opset(tmp_path: Path) -> None:
    text = "pooled = AveragePool<kernel_shape=[1, 1]>(images) logits = Flatten(pooled)"
    converted, kept = convert(graph_file(tmp_path / "pool.onnx", text, opset=20), "bf16")
    assert kept == ()
    assert onnx.load(converted).opset_import[0].version == 20
    images = images_for(converted)
    assert torch.equal(run_emulated(converted, images)["logits"], images.flatten(1).bfloat16().float())


def test_metadata_is_kept(convnet: Path, tmp_path: Path) -> None:
    converted, _ = convert(convnet, "fp16")
    for path in (converted, emulate_precision(converted, tmp_path / "emulated.onnx")):
        assert onnx.load(path).metadata_props == onnx.load(convnet).metadata_props
        assert read_onnx(path).classes == CLASSES


def test_reproducible(convnet: Path) -> None:
    before = convnet.read_bytes()
    first, second = (convert(convnet, "fp16")[0].read_bytes() for _ in range(2))
    assert first == second
    assert convnet.read_bytes() == before
    assert len(first) < 0.6 * len(before)


def test_external_weights(convnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_emulated(convert(convnet, "fp16")[0], images_for(convnet))
    monkeypatch.setattr("kd_pipeline.onnx.edit._MAX_INLINE_BYTES", 100)
    source, target = tmp_path / "large" / "convnet.onnx", tmp_path / "elsewhere" / "converted.onnx"
    source.parent.mkdir()
    onnx.save(onnx.load(convnet), source, save_as_external_data=True, location="weights", size_threshold=0)
    convert_precision(source, target, "fp16", images_for(source))
    assert Path(f"{target}.data").stat().st_size < 0.6 * Path(source.parent, "weights").stat().st_size
    shutil.rmtree(source.parent)
    found = run_emulated(target, images_for(convnet))
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_functions_are_inlined(tmp_path: Path) -> None:
    source = graph_file(
        tmp_path / "function.onnx",
        "flat = Flatten(images) logits = own.triple(flat)",
        domains=', "own" : 1',
        functions='<opset_import: ["" : 22], domain: "own"> triple (a) => (c) '
        "{ k = Constant<value_float=3.0>() c = Mul(a, k) }",
    )
    converted, kept = convert(source, "bf16")
    assert kept == ()
    assert Counter(node.op_type for node in onnx.load(converted).graph.node) == {"Cast": 2, "Flatten": 1, "Mul": 1}
    images = images_for(source)
    half = images.flatten(1).bfloat16()
    assert torch.equal(run_emulated(converted, images)["logits"], (half * 3).float())


def test_old_opset(tmp_path: Path) -> None:
    source = graph_file(
        tmp_path / "old.onnx",
        """scales = Constant<value=float[4] {1.0, 1.0, 2.0, 2.0}>() twice = Resize<mode="nearest">(images, scales)
        pooled = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(twice) logits = Flatten(pooled)""",
        opset=10,
    )
    converted, kept = convert(source, "fp16")
    assert kept == ()
    (scales,) = onnx.load(converted).graph.initializer
    assert scales.data_type == TensorProto.FLOAT
    images = images_for(source)
    assert torch.equal(run_emulated(converted, images)["logits"], images.half().float().flatten(1))
    with pytest.raises(EngineError, match=r"old\.onnx has opset 10, and bfloat16 needs 13"):
        convert(source, "bf16")


def assert_rejected(source: Path, samples: Tensor, message: str) -> None:
    """Converting fails with this message and leaves the target unchanged."""
    target = source.with_name("target.onnx")
    target.write_bytes(b"the old one")
    with pytest.raises(EngineError, match=f"(?s){re.escape(str(source))}.*{message}"):
        convert_precision(source, target, "fp16", samples)
    assert target.read_bytes() == b"the old one"


def test_custom_operator(tmp_path: Path) -> None:
    text = "flat = Flatten(images) [special] logits = own.Magic(flat)"
    source = graph_file(tmp_path / "custom.onnx", text, domains=', "own" : 1')
    assert_rejected(source, images_for(source), "node 'special' is own::Magic, .* custom ops cannot be converted")


def test_sequence_value(tmp_path: Path) -> None:
    text = """flat = Flatten(images) [pack] both = SequenceConstruct(flat, flat) one = Constant<value=int64 {1}>()
        logits = SequenceAt(both, one)"""
    source = graph_file(tmp_path / "sequence.onnx", text)
    assert_rejected(
        source, images_for(source), r"'both', the output of node 'pack' \(SequenceConstruct\), is not a tensor"
    )


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(2, 3, 5, 5), r"takes images \[any, 3, 4, 4\] float32, and the samples are \[2, 3, 5, 5\] float32"),
        (torch.zeros(2, 3, 4, 4).half(), r"takes images .* float32, and the samples are \[2, 3, 4, 4\] float16"),
    ],
)
def test_mismatched_samples(tmp_path: Path, samples: Tensor, message: str) -> None:
    assert_rejected(graph_file(tmp_path / "plain.onnx", GRAPHS["plain"]), samples, message)


def test_source_in_half_precision(convnet: Path) -> None:
    converted, _ = convert(convnet, "fp16", half_io=True)
    message = r"is not in float32: its weights are fp16, 'images' is \[any, 3, 32, 32\] float16"
    assert_rejected(converted, images_for(convnet).half(), message)


def test_runtime_error_is_quoted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "shape = Constant<value_ints=[-1, 48]>() flat = Reshape(images, shape) logits = Flatten(flat)"
    source = graph_file(tmp_path / "reshape.onnx", text.replace("-1, 48", "4, 48"))
    assert_rejected(source, images_for(source, 5), " on 5 samples: .*Reshape")
    assert capfd.readouterr() == ("", "")  # they are only in the error
