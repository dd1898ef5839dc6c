"""Networks for segmentation by name, with real models of timm and torchvision, and no downloads."""

from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from kd_pipeline import export_onnx
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.features import capture_features
from kd_pipeline.models.modules import named_outputs
from kd_pipeline.models.registry import ModelSettings, open_model, pretrained_input
from kd_pipeline.models.segmentation import Segmenter
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.session import open_session

SIZE = (64, 96)
VIT = {"timm": "vit_tiny_patch16_224", "kwargs": {"img_size": 64, "depth": 2}}
BY_NAME = {
    "lraspp": ({"torchvision": "lraspp_mobilenet_v3_large"}, SIZE),
    "deeplabv3": ({"torchvision": "deeplabv3_mobilenet_v3_large"}, SIZE),
    "fcn": ({"torchvision": "fcn_resnet50"}, SIZE),
    "resnet": ({"timm": "test_resnet", "head": "segmentation"}, (16, 24)),
    "mobilenet": ({"timm": "mobilenetv3_small_050", "head": "segmentation"}, (16, 24)),
    "vit": ({**VIT, "head": "segmentation"}, (4, 4)),
    "swin": ({"timm": "swin_s3_tiny_224", "head": "segmentation", "kwargs": {"img_size": 64}}, (16, 16)),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """A ResNet-50 takes a second to initialize, which is not what is tested."""
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda tensor, *arguments, **options: tensor)


@pytest.mark.parametrize("name", BY_NAME)
def test_logits_of_pixels(name: str, small: None):
    settings, grid = BY_NAME[name]
    model = open_model(ModelSettings.model_validate(settings), num_classes=5).eval()
    size = (64, 64) if grid[0] == grid[1] else SIZE
    with torch.no_grad():
        outputs = named_outputs(model(torch.randn(2, 3, *size)))
    assert {key: tuple(each.shape) for key, each in outputs.items()} == {"logits": (2, 5, *grid)}
    assert ModelSettings.model_validate(settings).is_of_pixels


def test_every_weight_of_the_head_is_trained():
    model = open_model(ModelSettings(timm="test_resnet", head="segmentation"), num_classes=5)
    logits = model(torch.randn(2, 3, 64, 64))["logits"]
    functional.cross_entropy(logits, torch.randint(5, (2, 16, 16))).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())


def test_layers_have_names_and_stages():
    model = open_model(ModelSettings(timm="test_resnet", head="segmentation"), num_classes=5)
    layer = timm.create_model("test_resnet").feature_info[2]["module"]
    with capture_features(model, [f"trunk.{layer}", "stage:2"]) as features:
        model(torch.randn(2, 3, 64, 64))
    assert torch.equal(features[f"trunk.{layer}"], features["stage:2"])


def test_images_of_the_trunk_are_known():
    model = open_model(ModelSettings(timm="test_resnet.r160_in1k", head="segmentation"), num_classes=5)
    assert pretrained_input(model) == pretrained_input(timm.create_model("test_resnet.r160_in1k"))


def test_width_of_the_head():
    settings = ModelSettings(timm="test_resnet", head="segmentation", kwargs={"head_width": 16})
    model = open_model(settings, num_classes=5)
    assert isinstance(model, Segmenter) and model.head.classifier.in_channels == 16


@pytest.mark.parametrize("with_classifier", [True, False])
def test_weights_of_a_backbone(with_classifier: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As of a classifier, or of a student that learned features: the head begins at random."""
    caplog.set_level("INFO")
    source = timm.create_model("test_resnet", num_classes=7 if with_classifier else 0)
    save_file(source.state_dict(), tmp_path / "trunk.safetensors")
    settings = ModelSettings(timm="test_resnet", head="segmentation", checkpoint=tmp_path / "trunk.safetensors")
    model = open_model(settings, num_classes=5, is_trained=True)
    expected = source.state_dict()
    for name, value in model.trunk.state_dict().items():
        assert torch.equal(value, expected[name])
    assert "no head for segmentation" in caplog.text
    with pytest.raises(ConfigError, match="does not fit"):
        open_model(settings, num_classes=5)


@pytest.mark.parametrize("by_name", [{"timm": "test_resnet", "head": "segmentation"}, BY_NAME["lraspp"][0]])
def test_own_weights_come_back(by_name: dict, tmp_path: Path):
    source = open_model(ModelSettings.model_validate(by_name), num_classes=5)
    save_file(source.state_dict(), tmp_path / "all.safetensors")
    settings = ModelSettings.model_validate(by_name | {"checkpoint": tmp_path / "all.safetensors"})
    for model in (open_model(settings), open_model(settings, num_classes=5, is_trained=True)):  # classes of the file
        for name, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "lraspp"])
def test_export(name: str, tmp_path: Path):
    settings, grid = BY_NAME[name]
    model = open_model(ModelSettings.model_validate(settings), num_classes=5).eval()
    path = export_onnx(model, tmp_path / "net.onnx", image_shape=(3, *SIZE), classes=list("abcde"))
    file = read_onnx(path)
    assert file.outputs["logits"].shape == (None, 5, *grid) and file.classes == tuple("abcde")
    images = torch.randn(3, 3, *SIZE)
    (found,) = open_session(path).run(None, {file.input_name: images.numpy()})
    with torch.no_grad():
        expected = named_outputs(model(images))["logits"]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_pretrained_backbone_is_not_downloaded(monkeypatch: pytest.MonkeyPatch):
    """torchvision's default for a network for segmentation is to download one."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    open_model(ModelSettings(torchvision="lraspp_mobilenet_v3_large"), num_classes=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torchvision": "resnet18", "head": "segmentation"}, "timm's models only; .* deeplabv3_resnet50"),
        ({"timm": "test_resnet", "head": "segmentation", "num_classes": 0}, "network for segmentation; remove"),
        ({"torchvision": "fcn_resnet50", "num_classes": 0}, "network for segmentation; remove num_classes"),
        ({"timm": "test_resnet", "head": "fcn"}, "Input should be 'segmentation'"),
    ],
)
def test_what_does_not_go_together(settings: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        ModelSettings.model_validate(settings)


def test_name_that_is_none():
    with pytest.raises(ConfigError, match=r"no classifier or network for segmentation called 'fcn_resnet5'.*resnet50"):
        open_model(ModelSettings(torchvision="fcn_resnet5"))
