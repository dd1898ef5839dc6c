import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError, EngineError, TeacherError
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.quantize import quantize_onnx
from kd_pipeline.onnx.session import fused_types
from kd_pipeline.teachers import quantized
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import CLASSES, IMAGE_SHAPE, LogitsOnly, cnn_backbone, random_images, vit_backbone

pytest.importorskip("openvino")
Runtime = Literal["openvino", "onnxruntime"]
BOTH = pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
IMAGES = random_images(64, seed=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kd_pipeline" / "int8"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "net.onnx"
    return export_onnx(LogitsOnly(), path, image_shape=IMAGE_SHAPE, classes=CLASSES)


def open_int8(onnx: Path, runtime: Runtime, images: Tensor = IMAGES) -> Teacher:
    settings = TeacherSettings(onnx=onnx, backend=runtime, precision="int8", num_threads=1)
    return open_teacher(settings, image_shape=IMAGE_SHAPE, batch_size=4, calibration_images=lambda: images)


@BOTH
def test_float32_file_runs_in_int8(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture, runtime: Runtime
) -> None:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    teacher = open_int8(source, runtime)
    assert (teacher.backend, teacher.precision, teacher.classes) == (runtime, "int8", CLASSES)
    images = random_images(9)
    expected = OnnxRuntimeTeacher(source)(images)["logits"]
    error = (teacher(images)["logits"] - expected).pow(2).mean().sqrt()
    assert 0 < error < 0.03 * expected.std()
    assert any(
        "compared with float32 on 64 images: 'logits' cosine 0.99" in message and "top-1 agreement" in message
        for message in caplog.messages
    )
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["batch_sizes"] == [1, 4] and manifest["runtime"] == runtime
    assert manifest["outputs"].keys() == {"logits"} and manifest["outputs"]["logits"]["cosine"] > 0.99
    assert manifest["onnx_sha256"] != manifest["quantized_sha256"]


@BOTH
@pytest.mark.parametrize("make", [vit_backbone, cnn_backbone])
def test_backbone_without_logits_runs_in_int8(
    tmp_path: Path, cache: Path, runtime: Runtime, make: Callable[[], nn.Module]
) -> None:
    source = export_onnx(make(), tmp_path / "net.onnx", image_shape=IMAGE_SHAPE, max_batch=2)
    teacher = open_int8(source, runtime)
    images = random_images(9)
    expected, outputs = OnnxRuntimeTeacher(source)(images), teacher(images)
    for name in ("pooled", "spatial"):
        error = (outputs[name] - expected[name]).pow(2).mean().sqrt()
        assert 0 < error < 0.1 * expected[name].std()
    assert teacher.outputs["spatial"].num_prefix_tokens == (3 if make is vit_backbone else None)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    manifest = quantized.read_quantized_manifest(folder)
    assert manifest.outputs.keys() == {"pooled", "spatial"}
    assert manifest.outputs["spatial"].position_cosine < 1 and manifest.outputs["pooled"].kl is None


def test_auto_on_a_cpu(source: Path) -> None:
    settings = TeacherSettings(onnx=source, precision="int8")
    teacher = open_teacher(settings, calibration_images=lambda: IMAGES)
    assert (teacher.backend, teacher.precision) == ("openvino", "int8")


@pytest.mark.slow
def test_network_is_quantized_from_its_export(source: Path) -> None:
    images, settings = random_images(9), TeacherSettings(precision="int8")
    options = {"image_shape": IMAGE_SHAPE, "batch_size": 4, "calibration_images": lambda: IMAGES}
    teacher = open_teacher(settings, module=LogitsOnly(), **options)
    assert (teacher.backend, teacher.precision) == ("openvino", "int8")
    assert torch.equal(teacher(images)["logits"], open_int8(source, "openvino")(images)["logits"])


def test_images_are_not_loaded_again(source: Path) -> None:
    def open_with(load: Callable[[], Tensor]) -> Teacher:
        settings = TeacherSettings(onnx=source, precision="int8")
        return open_teacher(settings, batch_size=4, calibration_images=load, calibration_key="data")

    images = random_images(9)
    first = open_with(lambda: IMAGES)
    second = open_with(lambda: pytest.fail("loaded again"))
    assert torch.equal(first(images)["logits"], second(images)["logits"])


def test_second_start_does_not_quantize(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_int8(source, "openvino")
    with monkeypatch.context() as patch:
        patch.setattr(quantized, "quantize_onnx", None)
        assert open_int8(source, "openvino").fingerprint == first.fingerprint
    open_int8(source, "openvino", IMAGES[:32])
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_images_are_needed(source: Path) -> None:
    with pytest.raises(ConfigError, match="pass calibration_images to open_teacher, or use bf16 or fp32"):
        open_teacher(TeacherSettings(onnx=source, precision="int8"))


def test_nothing_far_from_float32_is_kept(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(source: Path, target: Path, precision: Literal["int8"], images: Tensor, *, runtime: Runtime) -> Path:
        return quantize_onnx(source, target, precision, 0.05 * images, runtime=runtime)

    monkeypatch.setattr(quantized, "quantize_onnx", clip)
    with pytest.raises(
        EngineError, match="int8 teacher's outputs in batches of 1 are too far from float32 on 64 image"
    ):
        open_int8(source, "openvino")
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{}", "is no manifest: Field required; delete the folder"),
        ("manifest.json", b" " * (2 << 20), "cannot be read: it has 2097152 bytes"),
        ("teacher.onnx", None, "is not as it was written; delete the folder"),
    ],
)
def test_changed_files_are_refused(source: Path, cache: Path, name: str, content: bytes | None, message: str) -> None:
    open_int8(source, "openvino")
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    (folder / name).write_bytes(source.read_bytes() if content is None else content)
    with pytest.raises(TeacherError, match=message):
        open_int8(source, "openvino")


@pytest.mark.parametrize("kind", [OpenVINOTeacher, OnnxRuntimeTeacher])
def test_float32_arithmetic_is_not_called_int8(
    source: Path, kind: type[OpenVINOTeacher] | type[OnnxRuntimeTeacher]
) -> None:
    with pytest.raises(TeacherError, match=r"runs 0 of 3 layers of .*net\.onnx in int8; set the teacher's precision"):
        kind(source, precision="int8")


def test_cpu_without_int8_is_reported(
    source: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="kd_pipeline")
    monkeypatch.setattr(quantized, "cpu_precisions", lambda: frozenset({"fp32"}))
    open_int8(source, "openvino")
    assert any("no instructions for int8 (VNNI, AMX), so expect no gain over fp32" in line for line in caplog.messages)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = open_model(ModelSettings(builtin="small_resnet", kwargs={"width": 4}, num_classes=10)).eval()
    return export_onnx(net, tmp_path_factory.mktemp("resnet") / "resnet.onnx", image_shape=IMAGE_SHAPE)


def test_openvino_adds_in_int8(resnet: Path, tmp_path: Path) -> None:
    quantize_onnx(resnet, tmp_path / "int8.onnx", "int8", IMAGES, runtime="openvino")
    compiled = OpenVINOTeacher(tmp_path / "int8.onnx", precision="int8")._request.get_compiled_model()
    layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    of_type = {
        kind: [layer["runtimePrecision"].astype(str) for layer in layers if layer["layerType"].astype(str) == kind]
        for kind in ("Convolution", "Eltwise")
    }
    assert of_type["Convolution"] and set(of_type["Convolution"]) <= {"i8", "u8"}
    sums = [node for node in onnx.load(resnet).graph.node if node.op_type == "Add"]
    assert len(of_type["Eltwise"]) < len(sums), "only the last sum, which no int8 layer reads, is one of its own"


def test_onnxruntime_fuses_all_convolutions(resnet: Path, tmp_path: Path) -> None:
    types = fused_types(quantize_onnx(resnet, tmp_path / "int8.onnx", "int8", IMAGES, runtime="onnxruntime"))
    convolutions = [node for node in onnx.load(resnet).graph.node if node.op_type == "Conv"]
    assert types.count("QLinearConv") == len(convolutions)
    assert types.count("QLinearAdd") > 0


def train_on_digits(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Train for two seconds; images and labels that were not trained on."""
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    images = F.interpolate(images, scale_factor=2, mode="bilinear").contiguous()
    labels = torch.from_numpy(np.asarray(digits.target))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(3):
        for batch in torch.randperm(1000).split(50):
            F.cross_entropy(net(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return images[1000:], labels[1000:]


@pytest.mark.slow
def test_trained_network_keeps_its_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = open_model(ModelSettings(builtin="small_resnet", kwargs={"width": 8}, num_classes=10)).train()
    images, labels = train_on_digits(net)
    source = export_onnx(net.eval(), tmp_path / "digits.onnx", image_shape=(3, 16, 16))
    expected = OnnxRuntimeTeacher(source)(images)["logits"]
    assert (expected.argmax(1) == labels).double().mean() > 0.9
    for runtime in ("openvino", "onnxruntime"):
        settings = TeacherSettings(onnx=source, backend=runtime, precision="int8")
        teacher = open_teacher(settings, calibration_images=lambda: images[:64])
        found = teacher(images)["logits"]
        assert (found.argmax(1) == expected.argmax(1)).double().mean() > 0.98
        assert (found - expected).pow(2).mean().sqrt() < 0.05 * expected.std()
