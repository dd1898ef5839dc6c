"""The optimizer, its parameter groups, and settings that are refused."""

import copy
import io
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kd_pipeline.config.reader import read_config
from kd_pipeline.errors import ConfigError, MissingPackageError
from kd_pipeline.training.optimizers import OptimizerSettings, build_optimizer, match_memory_format
from tests.networks import ConvNet, LogitsOnly, random_images

timm = pytest.importorskip("timm")
NAMES = ["sgd", "adam", "adamw", "rmsprop", "lamb", "lion"]
SETTINGS = {"momentum": 0.9, "nesterov": True, "betas": (0.8, 0.95), "eps": 1e-5}


def groups_by_name(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def names_in(student, group):
    inside = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in student.named_parameters() if id(parameter) in inside}


def train(student, optimizer, num_steps, seed):
    student.eval()  # no dropout: the gradients follow from the weights
    for step in range(num_steps):
        optimizer.zero_grad()
        student(random_images(4, seed=seed + step)).square().mean().backward()
        optimizer.step()


def round_trip(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_minimizes(name):
    student = nn.Linear(3, 2)
    optimizer = build_optimizer(student, OptimizerSettings(name=name, lr=0.01))
    before = student(torch.ones(1, 3)).square().sum()
    for _ in range(5):
        optimizer.zero_grad()
        student(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    assert type(optimizer).__name__.lower() == name
    assert student(torch.ones(1, 3)).square().sum() < before


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name):
    settings = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1, lr_scale={"net.head": 0.5})
    student = LogitsOnly()
    optimizer = build_optimizer(student, settings)
    train(student, optimizer, 3, seed=0)
    saved = round_trip({"optimizer": optimizer.state_dict(), "student": student.state_dict()})
    train(student, optimizer, 3, seed=3)

    restarted = LogitsOnly(seed=1)
    restarted.load_state_dict(saved["student"])
    optimizer = build_optimizer(restarted, settings)
    optimizer.load_state_dict(saved["optimizer"])
    train(restarted, optimizer, 3, seed=3)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, restarted.get_parameter(name)), name


@pytest.mark.parametrize(
    ("name", "weight_decay"), [("sgd", 0), ("adam", 0), ("adamw", 0.01), ("rmsprop", 0), ("lamb", 0.01), ("lion", 0)]
)
def test_default_weight_decay(name, weight_decay):
    optimizer = build_optimizer(ConvNet(), OptimizerSettings(name=name))
    assert groups_by_name(optimizer)["student"]["weight_decay"] == weight_decay
    for given in (0.3, 0.0):
        optimizer = build_optimizer(ConvNet(), OptimizerSettings(name=name, weight_decay=given))
        assert groups_by_name(optimizer)["student"]["weight_decay"] == given


@pytest.mark.parametrize("name", NAMES)
def test_settings_reach_optimizers_that_have_them(name):
    for setting, value in SETTINGS.items():
        needed = {"momentum": 0.9} if setting == "nesterov" and name == "sgd" else {}
        known = setting in build_optimizer(ConvNet(), OptimizerSettings(name=name)).defaults
        if known:
            settings = OptimizerSettings(name=name, **{setting: value, **needed})
            assert build_optimizer(ConvNet(), settings).param_groups[0][setting] == value
        else:
            with pytest.raises(ValidationError, match=f"{setting}: .* has no effect with {name}"):
                OptimizerSettings(name=name, **{setting: value})


def test_torch_class_with_kwargs():
    settings = OptimizerSettings(name="torch.optim.RAdam", weight_decay=0.1, kwargs={"betas": (0.7, 0.8)})
    student = ConvNet(0)
    optimizer = build_optimizer(student, settings)
    assert type(optimizer) is torch.optim.RAdam
    assert groups_by_name(optimizer)["student"]["betas"] == (0.7, 0.8)
    assert {name: group["weight_decay"] for name, group in groups_by_name(optimizer).items()} == {
        "student": 0.1,
        "student/no_decay": 0.0,
    }


def test_named_optimizer_with_kwargs():
    assert build_optimizer(ConvNet(0), OptimizerSettings(name="adamw", kwargs={"amsgrad": True})).defaults["amsgrad"]


@pytest.mark.parametrize(
    "name", ["adamv", "torch.optim.Adamm", "torch.optim.lr_scheduler", "torch.optim.", "os.system"]
)
def test_unknown_optimizer_is_refused(name):
    with pytest.raises(ValidationError, match="there is no optimizer"):
        OptimizerSettings(name=name)


def test_setting_for_torch_class_belongs_in_kwargs():
    with pytest.raises(ValidationError, match=r"momentum: 0.5 is an argument of torch.optim.ASGD; set it in kwargs"):
        OptimizerSettings(name="torch.optim.ASGD", momentum=0.5)


@pytest.mark.parametrize("kwargs", [{"gamma": 1}, {"betas": (2.0, 0.9)}])
def test_bad_kwargs_are_refused(kwargs):
    with pytest.raises(ConfigError, match=r"train.optimizer: torch.optim.RAdam does not accept"):
        build_optimizer(ConvNet(0), OptimizerSettings(name="torch.optim.RAdam", kwargs=kwargs))


def test_nesterov_needs_momentum():
    for momentum in ({}, {"momentum": 0.0}):
        with pytest.raises(ValidationError, match="needs momentum"):
            OptimizerSettings(name="sgd", nesterov=True, **momentum)


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"lr": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"lr_scale": {"body": 0.0}}],
)
def test_bad_numbers_are_refused(settings):
    with pytest.raises(ValidationError):
        OptimizerSettings(**settings)


def test_norms_and_biases_do_not_decay():
    student = ConvNet()
    before = copy.deepcopy(student)
    optimizer = build_optimizer(student, OptimizerSettings(name="sgd", lr=0.1, weight_decay=0.5))
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in student.named_parameters():
        share = 1.0 if parameter.ndim == 1 else 0.95
        torch.testing.assert_close(parameter, before.get_parameter(name) * share, rtol=1e-6, atol=0, msg=name)
    assert {parameter.ndim for parameter in student.parameters()} == {1, 2, 4}


def test_decay_norm_and_bias():
    optimizer = build_optimizer(ConvNet(), OptimizerSettings(decay_norm_and_bias=True))
    (group,) = optimizer.param_groups
    assert (group["name"], group["weight_decay"]) == ("student", 0.01)


@pytest.mark.parametrize("wrap", [lambda student: student, nn.Sequential], ids=["bare", "nested"])
def test_no_weight_decay_list_is_honored(wrap):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    student = wrap(vit)
    groups = groups_by_name(build_optimizer(student, OptimizerSettings()))
    exempt = {name.removeprefix("0.") for name in names_in(student, groups["student/no_decay"])}
    assert {"pos_embed", "cls_token"} <= exempt
    assert exempt - {"pos_embed", "cls_token"} == {name for name, p in vit.named_parameters() if p.ndim == 1}
    (group,) = build_optimizer(student, OptimizerSettings(decay_norm_and_bias=True)).param_groups
    assert len(group["params"]) == len(list(student.parameters()))


class Listing(nn.Linear):
    """Lists a pattern, as timm's XCiT does."""

    def no_weight_decay(self):
        return {"wei*"}


def test_no_weight_decay_pattern_is_honored():
    student = nn.Sequential(Listing(2, 3), nn.Linear(3, 2))
    groups = groups_by_name(build_optimizer(student, OptimizerSettings()))
    assert names_in(student, groups["student"]) == {"1.weight"}


def test_trainable_parameters_are_in_one_group_each():
    student = ConvNet()
    student.body.requires_grad_(False)
    optimizer = build_optimizer(student, OptimizerSettings())
    assert {name: names_in(student, group) for name, group in groups_by_name(optimizer).items()} == {
        "student": {"head.weight"},
        "student/no_decay": {"head.bias"},
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_frozen_student_is_refused():
    with pytest.raises(ConfigError, match="no parameter of the student ConvNet is trainable"):
        build_optimizer(ConvNet().requires_grad_(False), OptimizerSettings())


def test_extra_parameters_join_student_group():
    projector, frozen = nn.Linear(4, 5), nn.Linear(2, 2).requires_grad_(False)
    settings = OptimizerSettings(lr=0.1, lr_scale={"head": 0.5})
    extra = (parameter for module in (projector, frozen) for parameter in module.parameters())
    groups = groups_by_name(build_optimizer(ConvNet(), settings, extra=extra))
    assert groups["student"]["params"][-1] is projector.weight
    assert groups["student"]["lr"] == 0.1
    assert groups["student/no_decay"]["params"][-1] is projector.bias
    assert not any(parameter in set(frozen.parameters()) for group in groups.values() for parameter in group["params"])


class Numbered(nn.Module):
    """Layers with a common prefix in their names."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        self.layer10 = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_longest_matching_layer_sets_lr():
    student = Numbered()
    settings = OptimizerSettings(lr=2.0, lr_scale={"layer1": 0.5, "layer1.1.weight": 0.1})
    groups = groups_by_name(build_optimizer(student, settings))
    assert {name: (group["lr"], names_in(student, group)) for name, group in groups.items()} == {
        "student.layer1": (1.0, {"layer1.0.weight"}),
        "student.layer1.1.weight": (0.2, {"layer1.1.weight"}),
        "student": (2.0, {"layer10.weight"}),
    }


def test_scaled_layer_has_decay_and_no_decay_groups():
    settings = OptimizerSettings(lr=2.0, lr_scale={"body": 0.5})
    groups = groups_by_name(build_optimizer(ConvNet(), settings))
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "student.body": (1.0, 0.01),
        "student.body/no_decay": (1.0, 0.0),
        "student": (2.0, 0.01),
        "student/no_decay": (2.0, 0.0),
    }


@pytest.mark.parametrize(
    ("layer", "rest"),
    [
        ("layr1", "did you mean 'layer1'"),
        ("layer", "did you mean 'layer1'"),
        ("layer1.", "did you mean 'layer1"),
        ("layer1.1.bias", "did you mean 'layer1.1'"),
        ("frozen", "there are 'layer1', 'layer1.0', "),
        ("", "there are"),
    ],
)
def test_unknown_layer_is_refused_with_suggestion(layer, rest):
    with pytest.raises(ConfigError, match=rf"the student has no trained parameter in '{layer}'; {rest}"):
        build_optimizer(Numbered(), OptimizerSettings(lr_scale={"layer10": 2.0, layer: 0.5}))


@pytest.mark.parametrize("name", ["lamb", "lion"])
def test_missing_timm(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kd_pipeline\[timm\]'"):
        build_optimizer(ConvNet(), OptimizerSettings(name=name))


def test_settings_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{name: lion, lr: 1e-4, betas: [0.9, 0.98], lr_scale: {body.0: 0.1}}")
    wanted = OptimizerSettings(name="lion", lr=1e-4, betas=(0.9, 0.98), lr_scale={"body.0": 0.1})
    assert read_config(OptimizerSettings, path) == wanted
    path.write_text("name: adamm")
    with pytest.raises(ConfigError, match="did you mean 'adam'"):
        read_config(OptimizerSettings, path)


def test_loaded_state_gets_the_order_of_the_weights():
    student = nn.Conv2d(3, 4, 3)
    optimizer = build_optimizer(student, OptimizerSettings(name="adamw"))
    train(student, optimizer, 2, seed=0)
    state = optimizer.state[student.weight]
    wanted = state["exp_avg"].clone()
    student.to(memory_format=torch.channels_last)
    match_memory_format(optimizer)
    assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == student.weight.stride() != wanted.stride()
    assert torch.equal(state["exp_avg"], wanted)
    assert state["step"] == 2
