"""Teachers for segmentation: logits of the pixels, `[N, K, h, w]`, by every runtime on a CPU."""

from pathlib import Path

import pytest
import torch

from kd_pipeline import export_onnx
from kd_pipeline.errors import TeacherError
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.outputs_check import check_outputs
from kd_pipeline.teachers.parity import measure_parity
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import IMAGE_SHAPE, NUM_CLASSES, PixelNet, random_images

SHAPE = (None, NUM_CLASSES, 32, 32)
NAMES = tuple(f"class {index}" for index in range(NUM_CLASSES))


@pytest.fixture(scope="module")
def network() -> PixelNet:
    return PixelNet().eval()


@pytest.fixture(scope="module")
def file(network: PixelNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network, tmp_path_factory.mktemp("onnx") / "net.onnx", image_shape=IMAGE_SHAPE, classes=NAMES)


def test_file_says_what_it_has(file: Path):
    found = read_onnx(file)
    assert found.outputs["logits"].shape == SHAPE
    assert found.classes == NAMES


@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime", "openvino"])
def test_logits_of_every_runtime(backend: str, network: PixelNet, file: Path):
    settings = {"backend": "pytorch"} if backend == "pytorch" else {"backend": backend, "onnx": file}
    module = network if backend == "pytorch" else None
    teacher = open_teacher(TeacherSettings.model_validate(settings), module=module, image_shape=IMAGE_SHAPE)
    assert teacher.outputs["logits"].shape == SHAPE
    images = random_images(3)
    with torch.no_grad():
        expected = network(images)["out"]
    torch.testing.assert_close(teacher(images)["logits"], expected, rtol=1e-3, atol=1e-4)
    assert not teacher.problems
    teacher.close()


def test_classes_in_the_order_of_the_data(file: Path):
    order = NAMES[3:] + NAMES[:3]
    settings = TeacherSettings(backend="onnxruntime", onnx=file)
    own, matched = (open_teacher(settings, image_shape=IMAGE_SHAPE) for _ in range(2))
    matched = match_classes(matched, order)
    images = random_images(2)
    assert matched.outputs["logits"].shape == SHAPE
    assert torch.equal(matched(images)["logits"], own(images)["logits"].roll(-3, 1))


def test_average_of_two():
    members = [PyTorchTeacher(PixelNet(seed=seed), image_shape=IMAGE_SHAPE) for seed in (1, 2)]
    images = random_images(2)
    expected = torch.stack([member(images)["logits"].softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(EnsembleTeacher(members)(images)["logits"].softmax(1), expected)


def test_probabilities_are_recognized():
    class Probabilities(PixelNet):
        def forward(self, images):
            return {"logits": super().forward(images)["out"].softmax(1)}

    teacher = PyTorchTeacher(Probabilities(), image_shape=IMAGE_SHAPE)
    (problem,) = check_outputs(teacher, normalization=Normalization((0.5,) * 3, (0.25,) * 3), image_shape=IMAGE_SHAPE)
    assert "probabilities already" in problem


def test_parity_counts_pixels():
    """As of as many rows."""
    wanted = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    found = wanted.clone()
    found[0, :, 1, 2] = found[0, :, 1, 2].flip(0)
    rows = [each.permute(0, 2, 3, 1).reshape(-1, 5) for each in (found, wanted)]
    parity, of_rows = (
        measure_parity({"logits": found}, {"logits": wanted}),
        measure_parity({"logits": rows[0]}, {"logits": rows[1]}),
    )
    assert parity["logits"].top1_agreement == of_rows["logits"].top1_agreement == pytest.approx(71 / 72)
    assert parity["logits"].kl == pytest.approx(of_rows["logits"].kl)


def test_logits_of_three_dimensions_are_refused():
    class Tokens(PixelNet):
        def forward(self, images):
            return {"logits": super().forward(images)["out"].flatten(2)}

    with pytest.raises(TeacherError, match=r"\[2, 10, 1024\].*not \[2, K\] or \[2, K, h, w\]"):
        PyTorchTeacher(Tokens(), image_shape=IMAGE_SHAPE)
