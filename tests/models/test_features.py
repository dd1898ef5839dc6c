import copy

import pytest
import timm
import torch
from torch import nn

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.backbone import Backbone
from kd_pipeline.models.features import capture_features, with_features
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from tests.networks import IMAGE_SHAPE, ConvNet, LogitsOnly, random_images


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 225, 5)
        )


def num_hooks(module: nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in module.modules())


def test_features_have_graph():
    net, images = small_net(), random_images(2)
    with capture_features(net, ["2", "0"]) as features:
        net(images)
    assert features["2"].equal(net[:3](images))
    assert features["0"].equal(net[0](images))
    features["2"].sum().backward()
    assert net[0].weight.grad.abs().sum() > 0


def test_hooks_are_removed():
    net = small_net()
    with capture_features(net, ["2"]):
        net(random_images(2))
    with pytest.raises(RuntimeError), capture_features(net, ["2"]):
        net(random_images(2, shape=(7, 32, 32)))
    assert num_hooks(net) == 0


def test_children_by_number():
    net, images = small_net(), random_images(2)
    with capture_features(net, ["layer:2", "layer:-1"]) as features:
        net(images)
    assert features["layer:2"].equal(net[:3](images))
    assert features["layer:-1"].equal(net(images))
    assert with_features(net, ["layer:3"])(images)["layer:3"].equal(net.eval()[:4](images))


@pytest.mark.parametrize("number", [5, -6])
def test_missing_child(number):
    words = rf"Sequential has 5 children and no layer:{number}; layer:0 is 0, .*layer:4 is 4, and negative"
    with pytest.raises(ConfigError, match=words), capture_features(small_net(), [f"layer:{number}"]):
        pass


def test_nested_layers():
    net = LogitsOnly()
    with capture_features(net, ["net.body.2"]) as features:
        net(random_images(2))
    assert features["net.body.2"].shape == (2, 16, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapper", "in place"])
def test_compiled_model(in_place):
    torch.compiler.reset()
    plain, net = small_net(), small_net()
    compiled = net
    if in_place:
        net.compile(backend="aot_eager")
    else:
        compiled = torch.compile(net, backend="aot_eager")
    for step in range(4):
        images = random_images(2 + step % 2, seed=step)
        for module, layers in ((plain, plain), (compiled, compiled if step % 2 else net)):
            with capture_features(layers, ["1", "2"]) as features:
                logits = module(images)
            (logits.square().mean() + features["1"].square().mean()).backward()
            if module is plain:
                expected = dict(features)
        for layer in ("1", "2"):
            torch.testing.assert_close(features[layer], expected[layer])
        for actual, desired in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, desired.grad)
        compiled.eval()(images)  # validation, without hooks, must not affect training
        compiled.train()
    assert num_hooks(net) == 0


def test_model_compiled_without_hooks():
    torch.compiler.reset()
    net = torch.compile(small_net(), backend="eager")
    net(random_images(2))
    with pytest.raises(ConfigError, match=r"'2' gave no output: .* compiled"), capture_features(net, ["2"]):
        net(random_images(2))


@pytest.mark.parametrize(
    ("name", "hint"), [("boddy", "did you mean 'body'"), ("x", "there are 'body', 'body.0'"), ("", "there are 'body'")]
)
def test_unknown_layer(name, hint):
    with (
        pytest.raises(ConfigError, match=f"ConvNet has no layer called '{name}'; {hint}"),
        capture_features(ConvNet(), [name]),
    ):
        pass
    with pytest.raises(ConfigError, match=f"ConvNet has no layer called '{name}'; {hint}"):
        with_features(ConvNet(), [name])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, rows):
        twice = self.layer(self.layer(rows))
        return twice + self.attention(twice, twice, twice)[0]


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("layer", "'layer' runs more than once"),
        ("unused", "'unused' gave no output"),
        ("attention", "'attention' returns tuple and not a tensor"),
    ],
)
def test_layer_without_single_output(layer, words):
    net = Recurrent()
    with pytest.raises(ConfigError, match=words), capture_features(net, [layer]):
        net(torch.zeros(2, 3))


def test_output_modified_in_place():
    """The ReLU after the BatchNorm modifies its output in place."""
    net = LogitsOnly()
    with pytest.raises(ConfigError, match=r"'net.body.1' is modified in place"), capture_features(net, ["net.body.1"]):
        net(random_images(2))
    with capture_features(net, ["net.body.2"]) as features:
        net(random_images(2))
    assert (features["net.body.2"] >= 0).all()
    with pytest.raises(ConfigError, match=r"'net.body.1' is modified in place"):
        with_features(net, ["net.body.1"])(random_images(2))


def test_inference_mode():
    net = small_net()
    with torch.inference_mode(), capture_features(net, ["2"]) as features:
        net(random_images(2))
    assert features["2"].shape == (2, 4, 15, 15)


def test_with_features_outputs():
    net = small_net().eval()
    outputs = with_features(net, ["2", "0"])(random_images(3))
    assert list(outputs) == ["logits", "2", "0"]
    assert outputs["logits"].equal(net(random_images(3)))
    assert outputs["2"].equal(net[:3](random_images(3)))


def test_with_features_keeps_outputs():
    outputs = with_features(ConvNet(), ["body.2"])(random_images(2))
    assert set(outputs) == {"logits", "features", "body.2"}


def test_layer_named_like_output():
    net = ConvNet()
    net.features = net.body
    with pytest.raises(ConfigError, match="'features' has the name of an output"):
        with_features(net, ["features"])(random_images(2))


def test_with_features_is_frozen_copy():
    net = small_net()
    module = with_features(net, ["2"])
    before = module(random_images(2))
    with torch.no_grad():
        net[0].weight.zero_()
    after = module(random_images(2))
    assert all(after[name].equal(before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training
    assert num_hooks(net) == 0


def test_copy_has_own_hooks():
    module = with_features(small_net(), ["2"])
    twin = copy.deepcopy(module)
    first, second = random_images(2, seed=1), random_images(2, seed=2)
    assert twin(first)["2"].equal(module(first)["2"])
    assert not twin(second)["2"].equal(module(first)["2"])


def test_with_features_compiles_to_one_graph():
    torch.compiler.reset()
    module = with_features(small_net(), ["2"])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        images = random_images(2, seed=seed)
        torch.testing.assert_close(compiled(images), module(images))


def test_pytorch_teacher_with_features():
    teacher = PyTorchTeacher(with_features(LogitsOnly(), ["net.body.2"]), image_shape=IMAGE_SHAPE)
    assert teacher.outputs["net.body.2"].shape == (None, 16, 16, 16)
    first = teacher(random_images(2))["net.body.2"].clone()
    again = teacher(random_images(2))
    assert again["net.body.2"].equal(first)
    other = PyTorchTeacher(with_features(LogitsOnly(), ["net.body.5"]), image_shape=IMAGE_SHAPE)
    assert other.fingerprint != teacher.fingerprint
    with pytest.raises(TeacherError, match=r"'net.body.1' is modified in place"):
        PyTorchTeacher(with_features(LogitsOnly(), ["net.body.1"]), image_shape=IMAGE_SHAPE)


def test_export_with_features(tmp_path):
    path = export_onnx(with_features(LogitsOnly(), ["net.body.2"]), tmp_path / "net.onnx", image_shape=IMAGE_SHAPE)
    outputs = read_onnx(path).outputs
    assert {name: spec.shape for name, spec in outputs.items()} == {
        "logits": (None, 10),
        "net.body.2": (None, 16, 16, 16),
    }


def backbone(name: str, **kwargs: object) -> Backbone:
    model = open_model(ModelSettings.model_validate({"timm": name, "num_classes": 0, "kwargs": kwargs})).eval()
    assert isinstance(model, Backbone)
    return model


def test_stages_of_timm():
    net, images = backbone("test_resnet"), random_images(2, shape=(3, 64, 64))
    with capture_features(net, ["stage:1", "layer1", "stage:-1", "layer4"]) as features:
        net(images)
    assert features["stage:1"].equal(features["layer1"]) and features["stage:-1"].equal(features["layer4"])
    assert list(features["stage:1"].shape) == [2, 32, 16, 16]


def test_stages_beside_the_outputs_of_a_backbone():
    net = backbone("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3)
    images = random_images(2, shape=(3, 32, 32))
    outputs = with_features(net, ["stage:-2", "blocks.0"])(images)
    assert list(outputs) == ["pooled", "spatial", "stage:-2", "blocks.0"]
    teacher = PyTorchTeacher(with_features(net, ["stage:-2", "patch_embed"]), image_shape=(3, 32, 32))
    prefix = {name: spec.num_prefix_tokens for name, spec in teacher.outputs.items()}
    assert prefix == {"pooled": None, "spatial": 1, "stage:-2": 1, "patch_embed": 0}


def test_stages_of_a_classifier():
    net = timm.create_model("test_resnet", num_classes=5).eval()
    assert list(with_features(net, ["stage:0"])(random_images(2, shape=(3, 64, 64)))) == ["logits", "stage:0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "layers"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, ["layers.1", "layers.1.blocks.0"]),
        ("mambaout_femto", {}, ["stages.1", "stages.1.blocks.0"]),
    ],
)
def test_maps_in_nhwc_are_returned_in_nchw(name, kwargs, layers):
    net, images = backbone(name, **kwargs), random_images(2, shape=(3, 64, 64))
    width = net.trunk.feature_info[1]["num_chs"]
    with capture_features(net, ["stage:1", *layers]) as features:
        net(images)
    assert features["stage:1"].equal(features[layers[0]])
    assert [list(output.shape) for output in features.values()] == [[2, width, 8, 8]] * 3


def test_unknown_stages():
    for name in ("stage:5", "stage:-6"):
        with (
            pytest.raises(
                ConfigError, match=rf"ResNet has 5 stages and no {name}; stage:0 is act1, .*stage:4 is layer4"
            ),
            capture_features(backbone("test_resnet"), [name]),
        ):
            pass
    with pytest.raises(ConfigError, match=r"ConvNet has no stages for stage:0, .* feature_info of timm's models; name"):
        with_features(ConvNet(), ["stage:0"])


def test_stage_whose_layer_is_missing():
    net = ConvNet()
    net.feature_info = [{"module": "boddy", "num_chs": 3}]
    with pytest.raises(ConfigError, match=r"'boddy', which its feature_info gives for stage:0; did you mean 'body'"):
        with_features(net, ["stage:0"])
