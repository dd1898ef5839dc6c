"""With real models of timm and torchvision, and no downloads."""

import inspect
import re
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import ModelSettings, known_input, open_model, pretrained_input
from kd_pipeline.models.resnet import cifar_resnet, small_resnet

FACTORY = f"{__name__}:tiny"


class Tiny(nn.Module):
    """A model whose own keys start with a prefix that wrappers use too."""

    def __init__(self, num_classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.model.append(nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def tiny(**arguments: int) -> nn.Module:
    return Tiny(**arguments)


def no_module() -> str:
    return "a network"


def with_weights(path: Path, **settings: object) -> nn.Module:
    return open_model(ModelSettings(factory=FACTORY, checkpoint=path, **settings), plugins=[__name__])


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def same_weights(found: nn.Module, expected: nn.Module) -> bool:
    return found.state_dict().keys() == expected.state_dict().keys() and all(
        torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items()
    )


@pytest.mark.parametrize("settings", [{"timm": "test_resnet"}, {"torchvision": "squeezenet1_1"}])
def test_library_model(
    settings: dict[str, str],
) -> None:
    model = open_model(ModelSettings(**settings, num_classes=7)).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert next(model.parameters()).dtype == torch.float32


def test_kwargs() -> None:
    model = open_model(ModelSettings(timm="test_resnet", kwargs={"in_chans": 1}))
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 1000)


SOURCES = {
    *(each.name for each in inspect.signature(timm.create_model).parameters.values() if each.kind != each.VAR_KEYWORD),
    *("pretrained_strict", "pretrained_filter_fn", "pretrained_model_args", "model_cfg", "feature_cfg"),
    *("weights", "weights_backbone", "default_cfg", "checkpoint_path", "weights_file", "url", "model_dir", "hub_repo"),
}


@pytest.mark.parametrize("library", ["timm", "torchvision", "builtin"])
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_kwargs_name_no_source_of_weights(library: str, name: str) -> None:
    network = "small_resnet" if library == "builtin" else "resnet18"
    with pytest.raises(
        ValidationError, match=f"kwargs: {name} is refused, .*; use checkpoint for a file and pretrained"
    ):
        ModelSettings(**{library: network}, kwargs={name: "/tmp/weights.pt"})


def test_kwargs_of_networks_are_allowed() -> None:
    networks = (timm.models.ResNet, timm.models.VisionTransformer, timm.models.SwinTransformerV2, timm.models.ConvNeXt)
    names = {name for network in networks for name in inspect.signature(network.__init__).parameters}
    assert {"drop_path_rate", "img_size", "weight_init", "pretrained_window_sizes"} < names
    ModelSettings(timm="resnet18", kwargs=dict.fromkeys(names, 1))


def test_a_factory_takes_any_kwargs() -> None:
    assert ModelSettings(factory=FACTORY, kwargs={"weights": "a.pt", "cache_dir": "/tmp"}).kwargs["weights"] == "a.pt"


def test_advice_to_run_code_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, **_kwargs: object) -> nn.Module:
        raise RuntimeError("weights_only=True blocked loading. If it is trusted, retry with weights_only=False.")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(
        ConfigError, match="timm's resnet18 cannot be built: its weights hold more than tensors"
    ) as caught:
        open_model(ModelSettings(timm="resnet18", pretrained=True))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timm": "resnet81"}, r"timm has no network called 'resnet81'; did you mean 'resnet\d+'"),
        ({"timm": "reznet50.a1_in1k"}, "'reznet50.a1_in1k'; did you mean .*'resnet50'"),
        ({"torchvision": "resnet81"}, r"torchvision has no classifier .* called 'resnet81'; did you mean 'resnet\d+'"),
        ({"torchvision": "fasterrcnn_resnet50_fpn"}, "torchvision has no classifier"),
        ({"torchvision": "%"}, r"there are .*'alexnet'.* and \d+ more"),
    ],
)
def test_unknown_model(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_model(ModelSettings(**settings))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_unknown_argument(library: str) -> None:
    with pytest.raises(ConfigError, match=f"{library}'s resnet18 cannot be built: .*'depht'.*; check kwargs"):
        open_model(ModelSettings(**{library: "resnet18"}, kwargs={"depht": 3}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set one of timm, torchvision, builtin, factory, got none of them"),
        ({"timm": "resnet18", "torchvision": "resnet18"}, "got timm and torchvision"),
        ({"factory": "nets:make", "pretrained": True}, "pretrained has no effect on a factory"),
        ({"timm": "resnet18", "pretrained": True, "checkpoint": "a.pt"}, "two sets of weights: .* checkpoint: a.pt"),
        ({"timm": "hf-hub:timm/resnet18.a1_in1k"}, "is not the name of a network, such as .* set as checkpoint"),
        ({"timm": "hf_hub:timm/resnet18"}, "is not the name of a network"),
        ({"timm": "local-dir:/tmp/resnet18"}, "is not the name of a network"),
        ({"timm": "resnet18.local-dir:/tmp/resnet18"}, "is not the name of a network"),
        ({"timm": "/tmp/resnet18"}, "is not the name of a network"),
        ({"factory": "nets.make"}, "should match pattern"),
        ({"factory": "os:system('true')"}, "should match pattern"),
    ],
)
def test_invalid_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSettings(**settings)


def test_json_round_trip() -> None:
    settings = ModelSettings(timm="resnet18", num_classes=10, checkpoint=Path("a.pt"), kwargs={"drop_rate": 0.1})
    assert ModelSettings.model_validate_json(settings.model_dump_json(), strict=True) == settings


def test_factory_needs_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef make(num_classes): return nn.Linear(1, num_classes)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ModelSettings(factory="my_nets:make", num_classes=5)
    for plugins in ([], ["my"], ["my_nets.more"]):
        with pytest.raises(ConfigError, match="would run code of the module my_nets; allow it with --plugin my_nets"):
            open_model(settings, plugins=plugins)
    assert "my_nets" not in sys.modules
    assert open_model(settings, plugins=["my_nets"]).out_features == 5


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_plugin:make", r"the plugin no_such_plugin cannot be imported \(No module named 'no_such_plugin'\)"),
        (f"{__name__}:nothing", r"test_registry\.py has no function called 'nothing'"),
        (f"{__name__}:FACTORY", r"test_registry\.py has no function called 'FACTORY'"),
        (f"{__name__}:no_module", "should return an nn.Module, got str"),
    ],
)
def test_invalid_factory(factory: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_model(ModelSettings(factory=factory), plugins=[factory.partition(":")[0]])


@pytest.mark.parametrize(
    ("code", "reason"), [("def make(:", "SyntaxError: "), ("1 / 0", "ZeroDivisionError: division")]
)
def test_plugin_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    (tmp_path / "broken_nets.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"the plugin broken_nets cannot be imported \({reason}"):
        open_model(ModelSettings(factory="broken_nets:make"), plugins=["broken_nets"])


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "student", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "student.", "_orig_mod.", "module._orig_mod."])
def test_checkpoint_wrappers_and_prefixes(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    expected = Tiny()
    state = {prefix + name: tensor for name, tensor in expected.state_dict().items()}
    path = saved(
        state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt"
    )
    assert not same_weights(tiny(), expected)
    assert same_weights(with_weights(path), expected)


def test_safetensors(tmp_path: Path) -> None:
    expected = Tiny()
    save_file(expected.state_dict(), tmp_path / "a.safetensors")
    assert same_weights(with_weights(tmp_path / "a.safetensors"), expected)


def test_mismatched_checkpoint(tmp_path: Path) -> None:
    state = Tiny(num_classes=9).state_dict()
    state["model.0.wight"] = state.pop("model.0.weight")
    with pytest.raises(ConfigError) as caught:
        with_weights(saved(state, tmp_path / "a.pt"))
    assert str(caught.value) == (
        f"{tmp_path / 'a.pt'} does not fit Tiny: 1 missing (model.0.weight); 1 unexpected (model.0.wight); "
        "2 of a different shape (model.4.weight [9, 4] in the file, [3, 4] in the model, "
        "model.4.bias [9] in the file, [3] in the model). Is it the checkpoint of another model, or of other kwargs? "
        "Name layers that should keep their random initialization in reset"
    )


def test_many_differences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"30 unexpected \(key 0, .*, key 9 and 20 more\)"):
        with_weights(saved({f"key {i}": torch.ones(1) for i in range(30)}, tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"net": {}, "epoch": 1}, "a mapping of net, epoch"),
        ([1, 2], "a list"),
        ({"state_dict": {"a": 1}}, "a mapping of state_dict"),
        ({}, "an empty mapping"),
        (torch.ones(3), "a Tensor"),
    ],
)
def test_checkpoint_without_state_dict(tmp_path: Path, content: object, found: str) -> None:
    with pytest.raises(ConfigError, match=f"holds {found}, and no state dict; write one with torch.save"):
        with_weights(saved(content, tmp_path / "a.pt"))


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))}/none\.pt: there is no such file"):
        with_weights(tmp_path / "none.pt")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_failed_download(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ConfigError, match=f"weights of {library}'s resnet18 cannot be downloaded .* set checkpoint"):
        open_model(ModelSettings(**{library: "resnet18"}, pretrained=True))


@pytest.mark.parametrize("num_classes", [3, 9])
def test_reset_layers(tmp_path: Path, num_classes: int) -> None:
    trained = Tiny(num_classes=num_classes)
    path = saved({f"module.{name}": tensor for name, tensor in trained.state_dict().items()}, tmp_path / "a.pt")
    torch.manual_seed(7)
    untouched = Tiny(num_classes=3).state_dict()
    torch.manual_seed(7)
    found = with_weights(path, reset=("model.4",)).state_dict()
    for name, tensor in found.items():
        expected = untouched if name.startswith("model.4.") else trained.state_dict()
        assert torch.equal(tensor, expected[name]), name


def test_only_reset_layers_may_be_missing(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in Tiny().state_dict().items() if not name.startswith("model.4")}
    with_weights(saved(state, tmp_path / "a.pt"), reset=("model.4",))
    del state["model.0.weight"]
    with pytest.raises(ConfigError, match=r"1 missing \(model\.0\.weight\)"):
        with_weights(saved(state, tmp_path / "b.pt"), reset=("model.4",))


@pytest.mark.parametrize(("layer", "hint"), [("model.9", "did you mean 'model"), ("model.2", ""), ("mod", "")])
def test_reset_of_unknown_layer(tmp_path: Path, layer: str, hint: str) -> None:
    path = saved(Tiny().state_dict(), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=rf"reset: Tiny has no weights in a layer '{layer}'.*{hint}"):
        with_weights(path, reset=(layer,))


def test_reset_needs_checkpoint() -> None:
    with pytest.raises(ValidationError, match="reset: head has no effect without a checkpoint; set checkpoint"):
        ModelSettings(timm="resnet18", reset=("head",))
    with pytest.raises(ValidationError, match="checkpoint_key: ema has no effect without a checkpoint; set checkpoint"):
        ModelSettings(timm="resnet18", checkpoint_key="ema")


def test_pretrained_input() -> None:
    given = pretrained_input(open_model(ModelSettings(timm="vit_tiny_patch16_224")))
    assert given is not None
    assert given == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (224, 224), True)
    free = pretrained_input(open_model(ModelSettings(timm="resnet18")))
    assert free is not None and not free.fixed_input_size
    assert pretrained_input(small_resnet(10, width=4)) is None


@pytest.mark.parametrize(("name", "num_parameters"), [("resnet8x4", 1_233_540), ("resnet32x4", 7_433_860)])
def test_cifar_resnet_num_parameters(name: str, num_parameters: int) -> None:
    net = open_model(ModelSettings(builtin=name, num_classes=100))
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_invalid_depth() -> None:
    with pytest.raises(ConfigError, match=r"is 8, 14, 20, .*, got 10"):
        cifar_resnet(10, 10)


@pytest.mark.parametrize("kwargs", [{}, {"img_size": 64}])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_input_is_known_before_and_after_building(kwargs: dict[str, int], num_classes: int) -> None:
    settings = ModelSettings(timm="vit_tiny_patch16_224", kwargs={**kwargs, "depth": 1}, num_classes=num_classes)
    known = known_input(settings)
    assert known is not None and known == pretrained_input(open_model(settings))
    assert known.size == (kwargs.get("img_size", 224),) * 2 and known.fixed_input_size


def test_input_of_other_libraries_is_unknown() -> None:
    assert known_input(ModelSettings(torchvision="resnet18")) is None
    assert known_input(ModelSettings(builtin="small_resnet")) is None
    with pytest.raises(ConfigError, match=r"no classifier .* called 'resnet19'; did you mean"):
        known_input(ModelSettings(torchvision="resnet19"))
