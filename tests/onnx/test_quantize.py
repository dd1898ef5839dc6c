import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kd_pipeline.errors import EngineError
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.edit import edit_onnx
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import ADAPTER_KEY, read_onnx
from kd_pipeline.onnx.quantize import quantize_onnx
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, cnn_backbone, random_images, vit_backbone
from tests.teachers.onnx_models import linear_model

Precision = Literal["int8", "fp8"]
BOTH = pytest.mark.parametrize("precision", ["int8", "fp8"])
ADAPTER = InputAdapter(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
SAMPLES = random_images(37, seed=1)
SAMPLES[-1] = -3.0 * SAMPLES[-1].abs()  # the largest magnitudes are negative and in the last batch


class TinyViT(nn.Module):
    """Patches, one transformer block with attention, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 32, 8, 8)
            self.norm = nn.LayerNorm(32)
            self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        attention = (self.query(normed) @ self.key(normed).transpose(1, 2) / 32**0.5).softmax(-1)
        tokens = tokens + attention @ self.value(normed)
        return self.head((tokens + self.mlp(self.norm(tokens))).mean(1))


def dead_net() -> ConvNet:
    """A `ConvNet` with two channels of zeros, and one whose weights are too small for a scale."""
    net = ConvNet()
    with torch.no_grad():
        for layer in (net.body[0], net.body[3]):
            layer.weight[3:5] = 0.0
            layer.weight[5] = 1e-38
    return net


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    conv = export_onnx(ConvNet(), folder / "conv.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES)
    return {
        "conv": conv,
        "adapted": edit_onnx(conv, folder / "adapted.onnx", input_adapter=ADAPTER),
        "vit": export_onnx(TinyViT(), folder / "vit.onnx", image_shape=IMAGE_SHAPE),
        "dead": export_onnx(dead_net(), folder / "dead.onnx", image_shape=IMAGE_SHAPE),
    }


@pytest.fixture(scope="module")
def quantized(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], Path]:
    folder = tmp_path_factory.mktemp("quantized")

    def quantize(name: str, precision: Precision) -> Path:
        path = folder / f"{name}.{precision}.onnx"
        return path if path.exists() else quantize_onnx(sources[name], path, precision, SAMPLES)

    return quantize


def run(path: Path, images: Tensor) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def quantized_layers(path: Path) -> dict[str, bool]:
    """Whether each Conv, Gemm and MatMul is quantized, by output, after checking that both inputs or none are."""
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        producers = [made_by.get(name) for name in node.input[:2]]
        paired = [producer is not None and producer.op_type == "DequantizeLinear" for producer in producers]
        assert paired in ([True, True], [False, False])
        for dequantize in producers if all(paired) else ():
            quantize = made_by[dequantize.input[0]]
            assert quantize.op_type == "QuantizeLinear"
            assert quantize.input[1:] == dequantize.input[1:]
        assert not any(name in made_by and "Linear" in made_by[name].op_type for name in node.input[2:])  # the bias
        found[node.output[0]] = all(paired)
    return found


@pytest.mark.parametrize(
    ("name", "precision", "num_quantized", "num_float"),
    [
        ("conv", "int8", 2, 1),
        ("conv", "fp8", 1, 2),  # and the convolution with 3 channels
        ("vit", "int8", 6, 3),  # and the two products in attention
        ("vit", "fp8", 5, 4),
    ],
)
def test_quantized_layers(
    sources: dict[str, Path],
    quantized: Callable[[str, Precision], Path],
    name: str,
    precision: Precision,
    num_quantized: int,
    num_float: int,
) -> None:
    path = quantized(name, precision)
    layers = quantized_layers(path)
    assert Counter(layers.values()) == {True: num_quantized, False: num_float}
    assert not layers["logits"]
    before, after = (Counter(node.op_type for node in onnx.load(file).graph.node) for file in (sources[name], path))
    assert set(after - before) == {"QuantizeLinear", "DequantizeLinear"}
    assert not before - after


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    networks = {"vit": vit_backbone(), "cnn": cnn_backbone(), "projected": Projected()}
    return {
        name: export_onnx(network, folder / f"{name}.onnx", image_shape=IMAGE_SHAPE, max_batch=2)
        for name, network in networks.items()
    }


class Projected(nn.Module):
    """A projection at the end, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.projection = vit_backbone(), nn.Linear(32, 16, bias=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"image_embeds": self.projection(self.trunk(images)["pooled"])}


@pytest.mark.parametrize(
    ("name", "num_float"),
    [
        ("vit", 4),  # the products in attention
        ("cnn", 0),
        ("projected", 5),  # and the projection, which the student learns from
    ],
)
def test_layers_of_a_network_without_logits(
    backbones: dict[str, Path], tmp_path: Path, name: str, num_float: int
) -> None:
    path = quantize_onnx(backbones[name], tmp_path / "quantized.onnx", "int8", SAMPLES)
    layers = quantized_layers(path)
    assert sum(not is_quantized for is_quantized in layers.values()) == num_float < len(layers)
    assert read_onnx(path).outputs == read_onnx(backbones[name]).outputs  # prefix tokens among them
    if name == "projected":
        assert not layers["image_embeds"]


@BOTH
def test_pairs_are_shared(quantized: Callable[[str, Precision], Path], precision: Precision) -> None:
    num_pairs = Counter(node.op_type for node in onnx.load(quantized("vit", precision)).graph.node)["QuantizeLinear"]
    num_weights = sum(quantized_layers(quantized("vit", precision)).values())
    num_activations = num_weights - 2  # query, key and value read the same tokens
    assert num_pairs == num_weights + num_activations


@BOTH
def test_scales(quantized: Callable[[str, Precision], Path], precision: Precision) -> None:
    expected = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[precision]
    for name in ("conv", "vit"):
        graph = onnx.load(quantized(name, precision)).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type != "QuantizeLinear":
                continue
            scale, zero = tensors[node.input[1]], tensors[node.input[2]]
            assert (scale.data_type, zero.data_type, zero.dims) == (TensorProto.FLOAT, expected, scale.dims)
            assert not np.any(numpy_helper.to_array(zero).astype(np.float32))
            if node.input[0] not in tensors:
                assert scale.dims == []
                continue
            weight = numpy_helper.to_array(tensors[node.input[0]])
            axis = node.attribute[0].i
            assert axis == (0 if weight.ndim == 4 else 1)
            assert scale.dims == [weight.shape[axis]]
            largest = np.abs(weight).max(tuple({*range(weight.ndim)} - {axis}))
            np.testing.assert_allclose(
                numpy_helper.to_array(scale), largest / {"int8": 127, "fp8": 448}[precision], rtol=1e-6
            )


def rounded(values: Tensor, largest: Tensor, precision: Precision) -> Tensor:
    if precision == "int8":
        scale = largest / 127
        return (values / scale).round().clamp(-128, 127) * scale
    scale = largest / 448
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@BOTH
def test_outputs_equal_fake_quantization(
    sources: dict[str, Path], quantized: Callable[[str, Precision], Path], precision: Precision
) -> None:
    weights = {array.shape: torch.tensor(array) for array in weights_of(sources["conv"]).values()}

    def convolve(images: Tensor, num_in: int, num_out: int, observed: Tensor | None) -> Tensor:
        weight = weights[num_out, num_in, 3, 3]
        if observed is not None:
            images = rounded(images, observed.abs().max(), precision)
            weight = rounded(weight, weight.abs().amax((1, 2, 3), keepdim=True), precision)
        return F.conv2d(images, weight, weights[(num_out,)], stride=2, padding=1).relu()

    images = random_images(16, seed=2)
    exact = convolve(convolve(images, 3, 16, None), 16, 32, None)
    inner = convolve(images, 3, 16, SAMPLES if precision == "int8" else None)
    expected = convolve(inner, 16, 32, convolve(SAMPLES, 3, 16, None))
    found = run(quantized("conv", precision), images)
    torch.testing.assert_close(run(sources["conv"], images)["features"], exact, atol=1e-5, rtol=1e-5)
    # A value halfway between two steps may round to either.
    assert (found["features"] - expected).abs().mean() < 0.05 * (exact - expected).abs().mean()
    logits = F.linear(found["features"].mean((2, 3)), weights[10, 32], weights[(10,)])
    torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["conv", "vit", "dead"])
@pytest.mark.parametrize(("precision", "allowed"), [("int8", 0.03), ("fp8", 0.06)])
def test_logits_error(
    sources: dict[str, Path],
    quantized: Callable[[str, Precision], Path],
    name: str,
    precision: Precision,
    allowed: float,
) -> None:
    images = random_images(32, seed=3)
    expected = run(sources[name], images)["logits"]
    error = (run(quantized(name, precision), images)["logits"] - expected).pow(2).mean().sqrt()
    assert 0 < error < allowed * expected.std()


@BOTH
def test_dead_channels(quantized: Callable[[str, Precision], Path], precision: Precision) -> None:
    path = quantized("dead", precision)
    scales = [array for name, array in weights_of(path).items() if name.endswith(".scale")]
    assert len(scales) == {"int8": 4, "fp8": 2}[precision]
    tiny = np.finfo(np.float32).tiny
    assert all((array >= tiny).all() and np.isfinite(array).all() for array in scales)
    assert torch.isfinite(run(path, SAMPLES)["logits"]).all()


@BOTH
def test_zero_activations(tmp_path: Path, precision: Precision) -> None:
    model = linear_model()
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "first")
    model.graph.initializer.append(weight)
    model.graph.node.insert(2, helper.make_node("MatMul", ["flat", "first"], ["hidden"]))
    model.graph.node[3].input[0] = "hidden"
    onnx.save(model, tmp_path / "source.onnx")
    target = quantize_onnx(tmp_path / "source.onnx", tmp_path / "target.onnx", precision, torch.zeros(2, 3, 8, 8))
    assert quantized_layers(target) == {"hidden": True, "product": False}
    assert all(array > 0 for name, array in weights_of(target).items() if name.startswith("flat.quantize.scale"))
    assert torch.equal(run(target, torch.zeros(1, 3, 8, 8))["logits"], torch.zeros(1, 5))


@pytest.mark.parametrize(("transposed", "channel"), [(0, 1), (1, 0)])
def test_gemm_channels(tmp_path: Path, transposed: int, channel: int) -> None:
    model = linear_model()
    weight = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    model.graph.initializer.append(numpy_helper.from_array(weight, "first"))
    model.graph.node.insert(2, helper.make_node("Gemm", ["flat", "first"], ["hidden"], transB=transposed))
    model.graph.node[3].input[0] = "hidden"
    onnx.save(model, tmp_path / "source.onnx")
    target = quantize_onnx(tmp_path / "source.onnx", tmp_path / "target.onnx", "int8", torch.ones(1, 3, 8, 8))
    scale = weights_of(target)[f"first.quantize.axis{channel}.scale"]
    np.testing.assert_allclose(scale, weight.max(axis=1 - channel) / 127, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("name", ["conv", "vit", "dead"])
def test_tensorrt_builds_engine(quantized: Callable[[str, Precision], Path], name: str, precision: Precision) -> None:
    from tests.onnx.engines import assert_builds  # skips this test only

    assert_builds(quantized(name, precision))


def test_fp8_convolutions(tmp_path: Path) -> None:
    convolutions = {
        nn.Conv2d(3, 16, 1): False,  # too few channels
        nn.Conv2d(16, 32, 5, padding=2): True,
        nn.Conv2d(32, 32, 7, padding=3): False,  # too large a kernel
        nn.Conv2d(32, 24, 3, padding=1): False,  # not a multiple of 16
        nn.Conv2d(24, 32, 3, padding=1): False,
        nn.Conv2d(32, 32, 3, padding=1, groups=32): False,  # one channel per group
        nn.Conv2d(32, 16, 3, padding=1): True,
    }
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    source = export_onnx(net, tmp_path / "source.onnx", image_shape=(3, 8, 8))
    images = random_images(2, shape=(3, 8, 8))
    int8 = quantized_layers(quantize_onnx(source, tmp_path / "int8.onnx", "int8", images))
    fp8 = quantized_layers(quantize_onnx(source, tmp_path / "fp8.onnx", "fp8", images))
    assert list(int8.values()) == [True] * 7 + [False]
    assert list(fp8.values()) == [*convolutions.values(), False]


@BOTH
def test_interface_and_metadata_are_kept(
    sources: dict[str, Path], quantized: Callable[[str, Precision], Path], precision: Precision
) -> None:
    before, after = read_onnx(sources["adapted"]), read_onnx(quantized("adapted", precision))
    assert after.classes == CLASSES
    assert (after.input_name, after.images, after.outputs) == (before.input_name, before.images, before.outputs)
    metadata = {entry.key: entry.value for entry in onnx.load(after.path).metadata_props}
    assert InputAdapter.model_validate_json(metadata[ADAPTER_KEY]) == ADAPTER
    onnx.checker.check_model(after.path, full_check=True)


def test_no_output_and_no_temporary_files(
    tmp_path: Path, sources: dict[str, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    beside = sorted(sources["conv"].parent.iterdir())
    caplog.set_level(logging.WARNING)
    target = tmp_path / "new" / "target.onnx"
    assert quantize_onnx(sources["conv"], target, "int8", SAMPLES) == target
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []
    assert list(target.parent.iterdir()) == [target]
    assert sorted(sources["conv"].parent.iterdir()) == beside


def test_reproducible(tmp_path: Path, sources: dict[str, Path]) -> None:
    first, second = (quantize_onnx(sources["vit"], tmp_path / f"{name}.onnx", "fp8", SAMPLES) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_in_place(tmp_path: Path, sources: dict[str, Path], quantized: Callable[[str, Precision], Path]) -> None:
    path = tmp_path / "teacher.onnx"
    path.write_bytes(sources["conv"].read_bytes())
    quantize_onnx(path, path, "int8", SAMPLES)
    assert path.read_bytes() == quantized("conv", "int8").read_bytes()


def test_external_weights(
    tmp_path: Path, sources: dict[str, Path], quantized: Callable[[str, Precision], Path]
) -> None:
    path = tmp_path / "teacher.onnx"
    onnx.save(onnx.load(sources["conv"]), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    target = quantize_onnx(path, tmp_path / "target.onnx", "int8", SAMPLES)
    images = random_images(3)
    assert torch.equal(run(target, images)["logits"], run(quantized("conv", "int8"), images)["logits"])


def old_opset() -> onnx.ModelProto:
    model = linear_model()
    model.opset_import[0].version = 18
    return model


def half_layer() -> onnx.ModelProto:
    """A float16 layer before the last one, which is float32."""
    model = linear_model()
    model.graph.initializer.append(numpy_helper.from_array(np.eye(3, dtype=np.float16), "first"))
    model.graph.node[2].attribute[0].i = TensorProto.FLOAT16
    model.graph.node.insert(3, helper.make_node("MatMul", ["cast", "first"], ["half"]))
    model.graph.node.insert(4, helper.make_node("Cast", ["half"], ["hidden"], to=TensorProto.FLOAT))
    model.graph.node[5].input[0] = "hidden"
    return model


SMALL = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("model", "precision", "samples", "message"),
    [
        (
            linear_model(weights=TensorProto.FLOAT16),
            "int8",
            SMALL,
            "has fp16 weights; int8 is quantized from",
        ),
        (old_opset(), "fp8", SMALL, "has opset 18, and fp8 needs 19"),
        (linear_model(), "int8", SMALL, "has no Conv, Gemm, MatMul with constant .* could run in int8"),
        (half_layer(), "int8", SMALL, "with constant float32 weights before its last layer"),
        (
            linear_model(),
            "int8",
            torch.zeros(2, 3, 9, 9),
            r"any, 3, 8, 8\] float32, and the samples are \[2, 3, 9, 9\]",
        ),
        (linear_model(), "int8", SMALL.half(), r"the samples are \[1, 3, 8, 8\] float16"),
        (linear_model(), "int8", SMALL[:0], r"the samples are \[0, 3, 8, 8\] float32"),
    ],
)
def test_invalid_source_or_samples(
    tmp_path: Path, model: onnx.ModelProto, precision: Precision, samples: Tensor, message: str
) -> None:
    source, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    onnx.save(model, source)
    target.write_bytes(b"the old one")
    with pytest.raises(EngineError, match=rf"source\.onnx .*{message}"):
        quantize_onnx(source, target, precision, samples)
    assert target.read_bytes() == b"the old one"
    assert sorted(tmp_path.iterdir()) == [source, target]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_samples_with_nan_or_inf(tmp_path: Path, sources: dict[str, Path], value: float) -> None:
    samples = SAMPLES.clone()
    samples[20, 1, 2, 3] = value
    with pytest.raises(EngineError, match="the samples contain NaN or inf"):
        quantize_onnx(sources["conv"], tmp_path / "target.onnx", "int8", samples)
    assert list(tmp_path.iterdir()) == []


def test_weights_with_nan(tmp_path: Path, sources: dict[str, Path]) -> None:
    model = onnx.load(sources["conv"])
    (weight,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [32, 16, 3, 3])
    array = numpy_helper.to_array(weight).copy()
    array[7, 0, 0, 0] = float("nan")
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "source.onnx")
    with pytest.raises(EngineError, match=f"'{weight.name}' contains NaN or inf"):
        quantize_onnx(tmp_path / "source.onnx", tmp_path / "target.onnx", "int8", SAMPLES)
    assert not (tmp_path / "target.onnx").exists()


def test_runtime_error_is_quoted(tmp_path: Path, sources: dict[str, Path]) -> None:
    model = onnx.load(sources["conv"])
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "NoSuchOperator", "custom"
    model.opset_import.append(onnx.helper.make_opsetid("custom", 1))
    path = tmp_path / "source.onnx"
    onnx.save(model, path)
    with pytest.raises(
        EngineError, match=r"(?s)ONNX Runtime cannot run .*source\.onnx on 37 samples: .*NoSuchOperator"
    ):
        quantize_onnx(path, tmp_path / "target.onnx", "int8", SAMPLES)
    assert list(tmp_path.iterdir()) == [path]
