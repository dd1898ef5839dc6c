"""Which weights of a checkpoint a network gets, with files as the usual trainers write them."""

import argparse
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import WeightAveraging
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.backbone import trunk_of
from kd_pipeline.models.registry import ModelSettings, open_model

State = dict[str, Tensor]
NAME = "test_resnet"


def network(seed: int, num_classes: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net: nn.Module = timm.create_model(NAME, num_classes=num_classes)
        net.bn1.running_mean.normal_()  # type: ignore[operator, union-attr]
    return net


def state(seed: int, num_classes: int = 5) -> State:
    return network(seed, num_classes).state_dict()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


RAW, EMA, OTHER = state(1), state(2), state(3)


def opened(content: object, path: Path, **settings: Any) -> nn.Module:
    torch.save(content, path / "a.pt")
    return open_model(ModelSettings(timm=NAME, checkpoint=path / "a.pt", **settings))


def same(model: nn.Module, expected: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


OPTIONS = {"args": argparse.Namespace(lr=np.float64(0.1)), "epoch": 3, "metric": np.float32(71.0)}
BUFFERS: State = {"n_averaged": torch.tensor(9)}
CRITERION: State = {"criterion.weight": torch.ones(5), "projectors.0.weight": torch.ones(3, 3)}


@pytest.mark.parametrize(
    ("content", "used"),
    [
        ({"state_dict": RAW, "state_dict_ema": EMA, "arch": "resnet18", **OPTIONS}, "state_dict_ema"),
        ({"model": RAW, "model_ema": prefixed("module.", EMA) | BUFFERS, "optimizer": {}, **OPTIONS}, "model_ema"),
        ({"net": RAW, "ema_net": EMA, "acc": np.float64(0.7), **OPTIONS}, "ema_net"),
        ({"state_dict": prefixed("module.", RAW), "ema_state_dict": prefixed("module.", EMA)}, "ema_state_dict"),
        ({"model": RAW, "ema_model": EMA, "it": 3}, "ema_model"),
        ({"student": prefixed("module.backbone.", RAW), "teacher": prefixed("backbone.", EMA)}, "teacher"),
        ({"state_dict": prefixed("student.", RAW), "ema": {"num_steps": 4, "student": EMA}}, "ema.student"),
        ({"state_dict": prefixed("model.", RAW) | prefixed("ema_model.module.", EMA)}, "state_dict.ema_model.module"),
        ({"state_dict": RAW, "callbacks": {"EMACallback": {"weights": EMA}}}, "callbacks.EMACallback.weights"),
        ({"model": RAW, "swa_model": prefixed("module.", EMA) | BUFFERS}, "swa_model"),
        (
            {"ema_state_dict": RAW, "state_dict": EMA, "meta": {"mmengine_version": "0.10"}, "message_hub": {}},
            "state_dict",
        ),
        (
            {"net": prefixed("student.", RAW) | prefixed("teacher.", OTHER)}
            | {"ema_net": prefixed("student.", EMA) | prefixed("teacher.", OTHER)},
            "ema_net.student",
        ),
        (RAW | prefixed("ema.", EMA), "ema"),
    ],
)
def test_averaged_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any], used: str) -> None:
    assert same(opened(content, tmp_path), EMA)
    (line,) = (record.message for record in caplog.records if "sets of weights" in record.message)
    assert f"using {used}, the averaged weights (EMA); for " in line
    hint = re.search(r"set checkpoint_key: (\S+)", line)
    assert hint is not None
    assert same(opened(content, tmp_path, checkpoint_key=hint[1]), RAW)
    assert same(opened(content, tmp_path, checkpoint_key=used), EMA)


def test_timm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = network(1)
    ema = ModelEmaV3(net, decay=0.5)
    with torch.no_grad():
        net.fc.weight.add_(1.0)  # type: ignore[operator, union-attr]
    ema.update(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=np.float64(0.1))
    saver = CheckpointSaver(net, optimizer, args=argparse.Namespace(model=NAME), model_ema=ema, checkpoint_dir=tmp_path)
    saver.save_checkpoint(0, metric=np.float64(70.0))
    path = tmp_path / "last.pth.tar"
    assert same(open_model(ModelSettings(timm=NAME, checkpoint=path)), ema.module.state_dict())
    assert "state_dict_ema" in caplog.text
    raw = open_model(ModelSettings(timm=NAME, checkpoint=path, checkpoint_key="state_dict"))
    assert same(raw, net.state_dict())


class Module(lightning.LightningModule):
    """A network as an attribute, and a criterion with weights of its own."""

    def __init__(self, net: nn.Module, lr: float = 0.1, options: object = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(5))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.criterion(self.net(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("averages", [False, True])
def test_lightning(tmp_path: Path, caplog: pytest.LogCaptureFixture, averages: bool) -> None:
    net = network(1)
    images = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        callbacks=[WeightAveraging(use_buffers=True)] if averages else [],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(net, options=argparse.Namespace(a=Path("b")))
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=2))
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    raw = torch.load(path, weights_only=False)["current_model_state" if averages else "state_dict"]
    raw = {name.removeprefix("net."): tensor for name, tensor in raw.items() if name.startswith("net.")}
    found = open_model(ModelSettings(timm=NAME, checkpoint=path))
    assert same(found, raw) != averages
    if averages:
        assert (
            "using state_dict, the averaged weights (EMA); for the other set checkpoint_key: current_model_state"
            in (caplog.text)
        )
        assert same(open_model(ModelSettings(timm=NAME, checkpoint=path, checkpoint_key="current_model_state")), raw)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "a.b.encoder_q.", "backbone."]
)
def test_prefix_beside_other_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str) -> None:
    caplog.set_level(logging.INFO)
    assert same(opened({"state_dict": prefixed(prefix, RAW) | CRITERION}, tmp_path), RAW)
    assert "ignored 2 tensors that are no part of ResNet: criterion (1), projectors (1)" in caplog.text


def test_wrappers_within_names(tmp_path: Path) -> None:
    wrapped = {
        re.sub(
            r"^(layer\d)\.", r"_fsdp_wrapped_module.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name
        ): tensor
        for name, tensor in RAW.items()
    }
    assert same(opened(wrapped, tmp_path), RAW)


def test_averaged_model_alone(tmp_path: Path) -> None:
    assert same(opened(AveragedModel(network(1)).state_dict(), tmp_path), RAW)


def test_counters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    counted = RAW | {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)}
    assert same(opened(counted, tmp_path), RAW)
    assert "ignored 2 tensors that are no part of ResNet: total_ops (1), total_params (1)" in caplog.text
    caplog.clear()
    old = {name: tensor for name, tensor in RAW.items() if not name.endswith("num_batches_tracked")}
    assert same(opened(old, tmp_path), RAW)
    assert "it has no num_batches_tracked, which hold no weights" in caplog.text


def test_classifier_of_openmmlab(tmp_path: Path) -> None:
    expected = resnet18(num_classes=5).state_dict()
    content = {"head." if name.startswith("fc.") else "backbone.": None for name in expected}
    assert len(content) == 2
    tensors = {("head." if name.startswith("fc.") else "backbone.") + name: each for name, each in expected.items()}
    torch.save(
        {"meta": {"epoch": 3}, "state_dict": tensors | {"data_preprocessor.mean": torch.ones(3)}}, tmp_path / "a"
    )
    assert same(open_model(ModelSettings(torchvision="resnet18", checkpoint=tmp_path / "a")), expected)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_deeper_network(tmp_path: Path, prefix: str) -> None:
    """Every name of the shallow network is in the file, and it is another network all the same."""
    deeper = RAW | {name.replace("layer1.0", "layer1.1"): tensor for name, tensor in RAW.items()}
    assert RAW.keys() < deeper.keys()
    with pytest.raises(
        ConfigError, match=r"does not fit ResNet: \d+ unexpected \(layer1\.1\.conv1\.weight.*of resnet34; is"
    ):
        opened({"state_dict": prefixed(prefix, deeper), "arch": "resnet34"}, tmp_path)


def test_order_never_counts(tmp_path: Path) -> None:
    renamed = {f"layer_{number}.weight": tensor for number, tensor in enumerate(RAW.values())}
    with pytest.raises(ConfigError, match=r"missing \(conv1\.0\.weight.*unexpected \(layer_0\.weight"):
        opened(renamed, tmp_path)


def test_unlike_companions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second classifier beside the network is ignored, but not in silence; as a part of it, it is refused."""
    assert same(opened(prefixed("model.", RAW) | {"head.weight": torch.ones(3)}, tmp_path), RAW)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ignored 1 tensors that are no part of ResNet: head (1)" in caplog.text
    with pytest.raises(ConfigError, match=r"1 unexpected \(head_dist\.weight\)"):
        opened(RAW | {"head_dist.weight": torch.ones(3)}, tmp_path)


def test_student_beside_its_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"state_dict": prefixed("module.student.", RAW) | prefixed("module.teacher.", OTHER)}
    assert same(opened(content, tmp_path), RAW)
    assert (
        "using state_dict.module.student, the network that was trained; for the other set checkpoint_key: "
        in caplog.text
    )
    assert same(opened(content, tmp_path, checkpoint_key="state_dict.module.teacher"), OTHER)


def test_one_network_under_two_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert same(opened(prefixed("model.", RAW) | prefixed("trunk.", RAW), tmp_path), RAW)
    assert "sets of weights" not in caplog.text


def test_sets_without_a_reason_to_choose(tmp_path: Path) -> None:
    content = {"first": RAW, "second": OTHER}
    with pytest.raises(
        ConfigError, match=r"holds 2 sets of weights that fit: first, second; set checkpoint_key to one"
    ):
        opened(content, tmp_path)
    assert same(opened(content, tmp_path, checkpoint_key="second"), OTHER)
    with pytest.raises(ConfigError, match=r"checkpoint_key: .* has no weights 'secnd'; did you mean 'second'"):
        opened(content, tmp_path, checkpoint_key="secnd")


def test_averaged_parameters_without_buffers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shadow = {name: tensor for name, tensor in EMA.items() if "running" not in name}
    assert same(opened({"model": RAW, "ema": {"shadow": shadow}}, tmp_path), RAW)
    assert "the averaged weights (EMA) in ema.shadow are not used: " in caplog.text
    assert ".running_mean, " in caplog.text


@pytest.mark.parametrize("settings", [{"timm": NAME}, {"torchvision": "squeezenet1_1"}, {"builtin": "resnet8x4"}])
def test_number_of_classes_of_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, str]
) -> None:
    caplog.set_level(logging.INFO)
    trained = open_model(ModelSettings(**settings, num_classes=7))
    torch.save(prefixed("module.", trained.state_dict()), tmp_path / "a.pt")
    found = open_model(ModelSettings(**settings, checkpoint=tmp_path / "a.pt"))
    assert same(found, trained.state_dict())
    assert "has 7 classes, as the checkpoint" in caplog.text


def test_number_of_classes_that_is_asked_for(tmp_path: Path) -> None:
    shapes = (
        r"fc\.weight \[5, 96\] in the file, \[9, 96\] in the model.*The file has 5 classes and the model 9: to train "
    )
    with pytest.raises(
        ConfigError, match=shapes + r"a new classifier, set reset: \[fc\]; to keep .* set num_classes: 5"
    ):
        opened(RAW, tmp_path, num_classes=9)
    assert same(opened(RAW, tmp_path, num_classes=5), RAW)
    assert opened(RAW, tmp_path, num_classes=9, reset=("fc",)).fc.out_features == 9  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"set reset: \[fc\]; the data decides on the model's number"):
        open_model(ModelSettings(timm=NAME, checkpoint=tmp_path / "a.pt"), num_classes=3)
    assert same(open_model(ModelSettings(timm=NAME, checkpoint=tmp_path / "a.pt"), num_classes=5), RAW)


def test_number_of_classes_of_a_new_classifier(tmp_path: Path) -> None:
    assert opened(RAW, tmp_path, reset=("fc",)).fc.out_features == 1000  # type: ignore[union-attr]


def test_image_size(tmp_path: Path) -> None:
    large = timm.create_model("test_vit", img_size=192, num_classes=5).state_dict()
    torch.save(large, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"for images of 192 pixels: set kwargs: \{img_size: 192\}") as caught:
        open_model(ModelSettings(timm="test_vit", checkpoint=tmp_path / "a.pt", num_classes=5))
    assert "pos_embed [1, 145, 64] in the file, [1, 101, 64] in the model" in str(caught.value)
    settings = ModelSettings(timm="test_vit", checkpoint=tmp_path / "a.pt", kwargs={"img_size": 192})
    assert same(open_model(settings), large)


def test_channels(tmp_path: Path) -> None:
    gray = timm.create_model(NAME, num_classes=5, in_chans=1).state_dict()
    with pytest.raises(ConfigError, match=r"for images of another number of channels, and images here have 3"):
        opened(gray, tmp_path, num_classes=5)


def test_missing_classifier(tmp_path: Path) -> None:
    backbone = {name: tensor for name, tensor in RAW.items() if not name.startswith("fc.")}
    with pytest.raises(
        ConfigError, match=r"2 missing \(fc\.weight, fc\.bias\)\. The file has no head: .* one, set reset: \[fc\]"
    ):
        opened(backbone, tmp_path)
    opened(backbone, tmp_path, reset=("fc",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor * float("nan"), r"is of a training that diverged: fc\.weight is not a number"),
        (
            lambda tensor: tensor.to(torch.int8),
            r"fc\.weight is torch\.int8 in the file and torch\.float32 in the model",
        ),
        (lambda tensor: tensor.to_sparse(), "cannot be copied into ResNet"),
    ],
)
def test_values(tmp_path: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(RAW | {"fc.weight": change(RAW["fc.weight"])}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in RAW.items()}
    model = opened(half, tmp_path)
    assert torch.equal(model.conv1[0].weight, half["conv1.0.weight"].float())  # type: ignore[index, union-attr]


Classifier = tuple[str, str, dict[str, Any], tuple[str, ...]]
CLASSIFIERS: list[Classifier] = [
    ("timm", "test_resnet", {}, ("fc",)),
    ("timm", "test_vit", {"img_size": 32}, ("head",)),
    ("timm", "test_convnext", {}, ("head.fc",)),
    ("torchvision", "shufflenet_v2_x0_5", {}, ("fc",)),
    ("builtin", "small_resnet", {"width": 4}, ("8",)),
]
LARGER_CLASSIFIERS: list[Classifier] = [
    ("timm", "levit_128s", {}, ("head", "head_dist")),  # with a BatchNorm
    ("timm", "deit_tiny_distilled_patch16_224", {"depth": 1}, ("head", "head_dist")),
    ("torchvision", "mobilenet_v3_small", {}, ("classifier.3",)),
    ("torchvision", "googlenet", {}, ("fc", "aux1", "aux2")),
]


def is_of(name: str, layers: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{layer}." for layer in layers))


def check_head(
    case: tuple[str, str, dict[str, Any], tuple[str, ...]], path: Path, log: pytest.LogCaptureFixture
) -> None:
    """A classifier's weights in a backbone, and a backbone's in a classifier."""
    log.set_level(logging.INFO)
    library, name, kwargs, head = case
    settings = ModelSettings.model_validate({library: name, "kwargs": kwargs, "num_classes": 7})
    headless = settings.model_copy(update={"num_classes": 0})
    trained = open_model(settings).state_dict()
    trunk = {key for key in trained if not is_of(key, head)}
    torch.save(trained, path / "classifier.pt")
    backbone = open_model(headless.model_copy(update={"checkpoint": path / "classifier.pt"}))
    found = trunk_of(backbone).state_dict()
    assert all(torch.equal(found[key], trained[key]) for key in trunk)
    assert {key for key, tensor in found.items() if tensor.numel()} == trunk
    (record,) = [record for record in log.records if "left out the head" in record.message]
    assert record.levelname == "INFO" and f"left out the head ({', '.join(head)})" in record.message
    log.clear()
    torch.save(found, path / "backbone.pt")
    from_backbone = settings.model_copy(update={"checkpoint": path / "backbone.pt"})
    tuned = open_model(from_backbone, is_trained=True).state_dict()
    assert all(torch.equal(tuned[key], trained[key]) for key in trunk) and tuned.keys() == trained.keys()
    (record,) = [record for record in log.records if "has no head" in record.message]
    assert record.levelname == "INFO" and f"initialized {', '.join(head)} at random" in record.message
    with pytest.raises(ConfigError, match=r"The file has no head: to use the network without one, set num_classes: 0"):
        open_model(from_backbone)
    again = trunk_of(open_model(headless.model_copy(update={"checkpoint": path / "backbone.pt"}))).state_dict()
    assert all(torch.equal(again[key], found[key]) for key in found)


@pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_head_of_file_or_model_alone(case: Classifier, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_head(case, tmp_path, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGER_CLASSIFIERS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_head_of_file_or_model_alone_in_more_networks(
    case: Classifier, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_head(case, tmp_path, caplog)


def test_only_the_head_may_be_missing(tmp_path: Path) -> None:
    backbone = {name: tensor for name, tensor in RAW.items() if not name.startswith("fc.")}
    torch.save({name: tensor for name, tensor in backbone.items() if name != "conv1.0.weight"}, tmp_path / "a.pt")
    settings = ModelSettings(timm=NAME, num_classes=5, checkpoint=tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"3 missing \(conv1\.0\.weight, fc\.weight, fc\.bias\)"):
        open_model(settings, is_trained=True)
    with pytest.raises(ConfigError, match=r"does not fit ResNet: 1 missing \(conv1\.0\.weight\)"):
        open_model(settings.model_copy(update={"num_classes": 0}))
    torch.save(RAW | {"extra.weight": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"1 unexpected \(extra\.weight\)"):
        open_model(settings.model_copy(update={"num_classes": 0}))


def test_missing_norm_before_the_head_is_no_head(tmp_path: Path) -> None:
    whole = timm.create_model("test_convnext", num_classes=5).state_dict()
    torch.save({name: tensor for name, tensor in whole.items() if not name.startswith("head.")}, tmp_path / "a.pt")
    settings = ModelSettings(timm="test_convnext", num_classes=5, checkpoint=tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"4 missing \(head\.norm\.weight"):
        open_model(settings, is_trained=True)


def test_backbone_in_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    """As `last.ckpt` and the weights of the best student have it."""
    backbone = {name: tensor for name, tensor in RAW.items() if not name.startswith("fc.")}
    projector = {"distillation.projectors.0.weight": torch.ones(3, 3)}
    torch.save({"state_dict": prefixed("student.trunk.", backbone) | projector, "epoch": 3}, tmp_path / "last.ckpt")
    torch.save(prefixed("trunk.", backbone), tmp_path / "best.pt")
    for file in ("last.ckpt", "best.pt"):
        settings = ModelSettings(timm=NAME, num_classes=5, checkpoint=tmp_path / file)
        tuned = open_model(settings, is_trained=True).state_dict()
        headless = trunk_of(open_model(settings.model_copy(update={"num_classes": 0}))).state_dict()
        assert all(torch.equal(tuned[name], tensor) for name, tensor in backbone.items())
        assert all(torch.equal(headless[name], tensor) for name, tensor in backbone.items())


def test_factory_does_not_say_what_its_head_is(tmp_path: Path) -> None:
    settings = ModelSettings(factory="tests.training.networks:plain", num_classes=10)
    state = open_model(settings, plugins=["tests.training.networks"]).state_dict()
    head = list(state)[-2:]
    torch.save({name: tensor for name, tensor in state.items() if name not in head}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"missing .*To train the missing layer, set reset"):
        open_model(
            settings.model_copy(update={"checkpoint": tmp_path / "a.pt"}),
            plugins=["tests.training.networks"],
            is_trained=True,
        )
