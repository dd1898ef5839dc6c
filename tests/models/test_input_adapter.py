import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import ExpectedInput, InputAdapter, Normalization
from kd_pipeline.models.registry import ModelSettings, automatic_input, pretrained_input
from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.onnx.edit import edit_onnx
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
from tests.networks import IMAGE_SHAPE, ConvNet

timm = pytest.importorskip("timm")
STUDENT = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
TEACHER = ExpectedInput(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
HALVES = (0.5, 0.5, 0.5)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pixels(num_images: int = 5) -> Tensor:
    return torch.rand(num_images, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


def open_net(module: nn.Module, normalization: Normalization | None = STUDENT, **settings: object) -> Teacher:
    found = TeacherSettings.model_validate(settings)
    return open_teacher(found, module=module, image_shape=IMAGE_SHAPE, normalization=normalization, num_images=1)


@pytest.mark.parametrize("size", [None, 20, (16, 24)])
def test_normalization_and_size(size: int | tuple[int, int] | None) -> None:
    teacher = open_net(ConvNet(), input_adapter=TEACHER.model_copy(update={"size": size}), features=["body.2"])
    found = teacher(normalized(pixels(), *STUDENT))
    seen = pixels() if size is None else F.interpolate(pixels(), size=size, mode="bilinear")
    net = ConvNet().eval()
    expected = {**net(normalized(seen, TEACHER.mean, TEACHER.std))}
    expected["body.2"] = net.body[:3](normalized(seen, TEACHER.mean, TEACHER.std))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_default_is_imagenet_normalization() -> None:
    found = open_net(ConvNet(), None, input_adapter=TEACHER)(normalized(pixels(), IMAGENET_MEAN, IMAGENET_STD))
    expected = ConvNet().eval()(normalized(pixels(), TEACHER.mean, TEACHER.std))
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)


def test_adapter_is_in_fingerprint() -> None:
    changes = ({}, {"size": 16}, {"size": 20}, {"mean": (0.4, 0.4, 0.3)})
    adapters = [None, *(TEACHER.model_copy(update=change) for change in changes)]
    assert len({open_net(ConvNet(), input_adapter=adapter).fingerprint for adapter in adapters}) == 5


def test_auto_follows_timm() -> None:
    net = timm.create_model("vit_tiny_patch16_224").eval()
    found = open_net(net, input_adapter="auto")(normalized(pixels(2), *STUDENT))
    seen = F.interpolate(pixels(2), size=(224, 224), mode="bilinear")
    torch.testing.assert_close(found["logits"], net(normalized(seen, HALVES, HALVES)), rtol=1e-3, atol=1e-3)
    free = timm.create_model("test_resnet").eval()
    assert free.pretrained_cfg["input_size"] != IMAGE_SHAPE
    mean, std = free.pretrained_cfg["mean"], free.pretrained_cfg["std"]
    found = open_net(free, input_adapter="auto")(normalized(pixels(2), *STUDENT))
    torch.testing.assert_close(found["logits"], free(normalized(pixels(2), mean, std)), rtol=1e-4, atol=1e-4)


def test_auto_without_need() -> None:
    net = timm.create_model("test_resnet")
    right = Normalization(net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
    plain = open_net(net, right)
    assert open_net(net, right, input_adapter="auto").fingerprint == plain.fingerprint
    assert open_net(net, STUDENT, input_adapter="auto").fingerprint != plain.fingerprint


def test_auto_of_unknown_model() -> None:
    with pytest.raises(ConfigError, match="ConvNet does not say what it was trained on; give mean and std"):
        open_net(ConvNet(), input_adapter="auto")


def test_onnx_backend_rejects_adapter() -> None:
    with pytest.raises(ConfigError, match=r"input_adapter: .* means nothing to teacher.onnx, which is finished"):
        open_teacher(TeacherSettings(onnx=Path("teacher.onnx"), input_adapter=TEACHER))


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("normalization", [STUDENT, Normalization(HALVES, HALVES)])
@pytest.mark.parametrize("adapter", [None, "auto"])
def test_mismatched_normalization_warns(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    pretrained: bool,
    normalization: Normalization,
    adapter: str | None,
) -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32)  # substitute for a downloaded model
    monkeypatch.setattr("kd_pipeline.teachers.runner.open_model", lambda settings, plugins: net)
    weights = {"pretrained": True} if pretrained else {"checkpoint": tmp_path}
    model = ModelSettings(timm="vit_tiny_patch16_224", **weights)
    settings = TeacherSettings.model_validate({"model": model, "input_adapter": adapter and TEACHER})
    open_teacher(settings, image_shape=IMAGE_SHAPE, normalization=normalization)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if pretrained and normalization == STUDENT and adapter is None:
        (warning,) = warnings
        assert "mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5)" in warning and "mean (0.1, 0.2, 0.3)" in warning
        assert "input_adapter: auto" in warning
    else:
        assert not warnings


@pytest.mark.parametrize("as_ensemble", [False, True])
def test_loader_passes_normalization(photo_folder: Path, tmp_path: Path, as_ensemble: bool) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "net.pt")
    model = ModelSettings(timm="test_resnet", num_classes=3, checkpoint=tmp_path / "net.pt")
    teacher: TeacherSettings | EnsembleSettings = TeacherSettings(model=model, input_adapter=TEACHER)
    if as_ensemble:
        teacher = EnsembleSettings(members=(teacher, teacher), average="logits")
    data = {
        "batch_size": 4,
        "device": "cpu",
        "num_threads": 1,
        "train": {
            "source": {"kind": "image_folder", "root": photo_folder},
            "transform": {"preset": "train", "size": 32, "mean": STUDENT.mean, "std": STUDENT.std},
        },
    }
    net = timm.create_model("test_resnet", num_classes=3)
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    with KDDataLoader.from_config(Config(data=data, teacher=teacher)) as loader:
        batch = next(iter(loader))
        seen = batch.images * torch.tensor(STUDENT.std).view(3, 1, 1) + torch.tensor(STUDENT.mean).view(3, 1, 1)
        expected = net.eval()(normalized(seen, TEACHER.mean, TEACHER.std))
        torch.testing.assert_close(batch.teacher["logits"], expected, rtol=1e-4, atol=1e-4)


def test_values_for_0_to_255_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"divide by 255: \[0.485, 0.456, 0.406\]"):
        ExpectedInput(mean=(123.675, 116.28, 103.53), std=(0.229, 0.224, 0.225))
    with pytest.raises(ValidationError, match=r"from_std\n.* divide by 255: \[0.229, 0.224, 0.225\]"):
        InputAdapter(mean=(0, 0, 0), std=(1, 1, 1), from_std=(58.395, 57.12, 57.375))


# Gray images, for a network with one input channel

GRAY = ExpectedInput(mean=(0.13,), std=(0.31,))


def gray_pixels(colors: Tensor) -> Tensor:
    """One channel as Pillow's mode L has it: its shares of red, green and blue are in thousandths."""
    return (299 * colors[:, :1] + 587 * colors[:, 1:2] + 114 * colors[:, 2:]) / 1000


@pytest.mark.parametrize("size", [None, (16, 24)])
@pytest.mark.parametrize("backend", ["pytorch", "openvino"])
def test_gray_network_gets_one_channel(
    backend: str, size: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where openvino keeps the exported network
    network = small_resnet(10, width=4, in_channels=1).eval()
    expected = GRAY.model_copy(update={"size": size})
    found = open_net(network, input_adapter=expected, backend=backend)(normalized(pixels(), *STUDENT))
    gray = (gray_pixels(pixels()) - 0.13) / 0.31
    gray = gray if size is None else F.interpolate(gray, size=size, mode="bilinear")
    torch.testing.assert_close(found["logits"], network(gray), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [None, (16, 24)])
def test_gray_onnx_file_gets_one_channel(tmp_path: Path, size: tuple[int, int] | None) -> None:
    network = small_resnet(10, width=4, in_channels=1).eval()
    path = export_onnx(network, tmp_path / "gray.onnx", image_shape=(1, *(size or IMAGE_SHAPE[1:])))
    adapter = GRAY.model_copy(update={"size": size}).adapter(STUDENT)
    edited = edit_onnx(path, tmp_path / "adapted.onnx", input_adapter=adapter)
    with closing(open_teacher(TeacherSettings(onnx=edited), image_shape=IMAGE_SHAPE, num_images=1)) as teacher:
        found = teacher(normalized(pixels(), *STUDENT))["logits"]
    gray = (gray_pixels(pixels()) - 0.13) / 0.31
    gray = gray if size is None else F.interpolate(gray, size=size, mode="bilinear")
    torch.testing.assert_close(found, network(gray), rtol=1e-3, atol=1e-4)


def test_auto_of_timm_network_with_one_channel_takes_the_mean_of_means() -> None:
    network = timm.create_model("resnet18", in_chans=1, num_classes=3)
    found = automatic_input(network, pretrained_input(network), None)
    assert found.mean == pytest.approx((sum(IMAGENET_MEAN) / 3,)) and found.std == pytest.approx(
        (sum(IMAGENET_STD) / 3,)
    )
    images = Normalization()
    teacher = open_net(network, images, input_adapter="auto")
    gray = (gray_pixels(pixels()) - found.mean[0]) / found.std[0]
    with torch.no_grad():
        expected = network.eval()(gray)
    torch.testing.assert_close(teacher(normalized(pixels(), *images))["logits"], expected, rtol=1e-3, atol=1e-3)


def test_two_values_or_other_numbers_are_refused() -> None:
    with pytest.raises(ValidationError, match="mean has 1 values and std 3; give one per channel to both"):
        ExpectedInput(mean=(0.5,), std=HALVES)
    with pytest.raises(ValidationError, match="needs three values"):
        ExpectedInput(mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(ValidationError, match="from 0 to 255"):
        ExpectedInput(mean=(33.3,), std=(0.3,))
