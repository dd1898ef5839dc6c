"""A teacher by name gets the images it was trained on, though the loader's are normalized for the student."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGENET_MEAN, IMAGENET_STD
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.input_adapter import Normalization, WantedInput
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
from tests.networks import IMAGE_SHAPE, ConvNet

timm = pytest.importorskip("timm")
OURS = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
THEIRS = WantedInput(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
HALVES = (0.5, 0.5, 0.5)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pixels(num_images: int = 5) -> Tensor:
    return torch.rand(num_images, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


def open_net(module: nn.Module, normalization: Normalization | None = OURS, **settings: object) -> Teacher:
    found = TeacherSettings.model_validate(settings)
    return open_teacher(found, module=module, image_shape=IMAGE_SHAPE, normalization=normalization)


@pytest.mark.parametrize("size", [None, 20])
def test_the_module_sees_the_pixels_in_its_own_normalization_and_size(size: int | None) -> None:
    teacher = open_net(ConvNet(), input_adapter=THEIRS.model_copy(update={"size": size}), features=["body.2"])
    found = teacher(normalized(pixels(), *OURS))
    seen = pixels() if size is None else F.interpolate(pixels(), size=(size, size), mode="bilinear")
    net = ConvNet().eval()
    wanted = {**net(normalized(seen, THEIRS.mean, THEIRS.std))}
    wanted["body.2"] = net.body[:3](normalized(seen, THEIRS.mean, THEIRS.std))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_what_the_images_are_normalized_with_is_imagenets_unless_given() -> None:
    found = open_net(ConvNet(), None, input_adapter=THEIRS)(normalized(pixels(), IMAGENET_MEAN, IMAGENET_STD))
    wanted = ConvNet().eval()(normalized(pixels(), THEIRS.mean, THEIRS.std))
    torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)


def test_teachers_that_see_other_images_have_other_fingerprints() -> None:
    changes = ({}, {"size": 16}, {"size": 20}, {"mean": (0.4, 0.4, 0.3)})
    adapters = [None, *(THEIRS.model_copy(update=change) for change in changes)]
    assert len({open_net(ConvNet(), input_adapter=adapter).fingerprint for adapter in adapters}) == 5


def test_auto_takes_what_timm_knows_and_the_size_of_those_that_take_no_other() -> None:
    net = timm.create_model("vit_tiny_patch16_224").eval()
    found = open_net(net, input_adapter="auto")(normalized(pixels(2), *OURS))
    seen = F.interpolate(pixels(2), size=(224, 224), mode="bilinear")
    torch.testing.assert_close(found["logits"], net(normalized(seen, HALVES, HALVES)), rtol=1e-3, atol=1e-3)
    free = timm.create_model("test_resnet").eval()
    assert free.pretrained_cfg["input_size"] != IMAGE_SHAPE
    mean, std = free.pretrained_cfg["mean"], free.pretrained_cfg["std"]
    found = open_net(free, input_adapter="auto")(normalized(pixels(2), *OURS))
    torch.testing.assert_close(found["logits"], free(normalized(pixels(2), mean, std)), rtol=1e-4, atol=1e-4)


def test_auto_adds_nothing_where_the_images_are_right_already() -> None:
    net = timm.create_model("test_resnet")
    right = Normalization(net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
    plain = open_net(net, right)
    assert open_net(net, right, input_adapter="auto").fingerprint == plain.fingerprint
    assert open_net(net, OURS, input_adapter="auto").fingerprint != plain.fingerprint


def test_auto_is_refused_for_a_network_that_does_not_say() -> None:
    with pytest.raises(ConfigError, match="ConvNet does not say what it was trained on; give mean and std"):
        open_net(ConvNet(), input_adapter="auto")


def test_a_file_gets_its_adapter_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"input_adapter: .* means nothing to the openvino backend"):
        open_teacher(TeacherSettings(onnx=Path("teacher.onnx"), input_adapter=THEIRS))


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("normalization", [OURS, Normalization(HALVES, HALVES)])
@pytest.mark.parametrize("adapter", [None, "auto"])
def test_pretrained_weights_that_want_other_images_are_a_warning_with_both(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    pretrained: bool,
    normalization: Normalization,
    adapter: str | None,
) -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32)  # stands for one whose weights were downloaded
    monkeypatch.setattr("kd_pipeline.teachers.open.open_model", lambda settings, plugins: net)
    weights = {"pretrained": True} if pretrained else {"checkpoint": tmp_path}
    model = ModelSettings(timm="vit_tiny_patch16_224", **weights)
    settings = TeacherSettings.model_validate({"model": model, "input_adapter": adapter and THEIRS})
    open_teacher(settings, image_shape=IMAGE_SHAPE, normalization=normalization)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if pretrained and normalization == OURS and adapter is None:
        (warning,) = warnings
        assert "mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5)" in warning and "mean (0.1, 0.2, 0.3)" in warning
        assert "input_adapter: auto" in warning
    else:
        assert not warnings


@pytest.mark.parametrize("as_ensemble", [False, True])
def test_a_loader_tells_its_teacher_how_its_images_are_normalized(
    photo_folder: Path, tmp_path: Path, as_ensemble: bool
) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "net.pt")
    model = ModelSettings(timm="test_resnet", num_classes=3, checkpoint=tmp_path / "net.pt")
    teacher: TeacherSettings | EnsembleSettings = TeacherSettings(model=model, input_adapter=THEIRS)
    if as_ensemble:
        teacher = EnsembleSettings(members=(teacher, teacher), average="logits")
    data = {
        "batch_size": 4,
        "device": "cpu",
        "num_threads": 1,
        "train": {
            "source": {"kind": "image_folder", "root": photo_folder},
            "transform": {"preset": "train", "size": 32, "mean": OURS.mean, "std": OURS.std},
        },
    }
    net = timm.create_model("test_resnet", num_classes=3)
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    with KDDataLoader.from_config(Config(data=data, teacher=teacher)) as loader:
        batch = next(iter(loader))
        seen = batch.images * torch.tensor(OURS.std).view(3, 1, 1) + torch.tensor(OURS.mean).view(3, 1, 1)
        wanted = net.eval()(normalized(seen, THEIRS.mean, THEIRS.std))
        torch.testing.assert_close(batch.teacher["logits"], wanted, rtol=1e-4, atol=1e-4)
