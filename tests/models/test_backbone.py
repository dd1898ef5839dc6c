"""Networks by name without their heads: what comes out, and that it trains, copies, compiles and exports."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.backbone import Backbone, num_prefix_tokens, trunk_of, without_head
from kd_pipeline.models.registry import ModelSettings, open_model

TINY_VIT = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
SMALL = [
    # library, name, kwargs, size of the images, pooled, spatial, prefix tokens
    ("timm", "vit_tiny_patch16_224", TINY_VIT | {"patch_size": 8}, 32, [48], [17, 48], 1),
    ("timm", "vit_small_patch14_reg4_dinov2", TINY_VIT | {"patch_size": 16}, 32, [48], [9, 48], 5),
    ("timm", "vit_small_patch16_dinov3", TINY_VIT, 32, [48], [9, 48], 5),
    ("timm", "deit_tiny_distilled_patch16_224", TINY_VIT, 32, [48], [6, 48], 2),
    ("timm", "vit_base_patch16_siglip_224", TINY_VIT, 32, [48], [4, 48], 0),
    ("timm", "resnet18", {}, 32, [512], [512, 1, 1], None),
    ("timm", "test_convnext", {}, 64, [64], [64, 2, 2], None),
    ("timm", "test_efficientnet", {}, 64, [256], [256, 2, 2], None),
    ("timm", "mobilenetv3_small_050", {}, 64, [1024], [288, 2, 2], None),
    ("torchvision", "resnet18", {}, 32, [512], [512, 1, 1], None),
    ("torchvision", "mobilenet_v3_small", {}, 64, [1024], [576, 2, 2], None),
    ("torchvision", "shufflenet_v2_x0_5", {}, 64, [1024], [1024, 2, 2], None),
    ("builtin", "small_resnet", {"width": 4}, 32, [16], [16, 4, 4], None),
    ("builtin", "resnet8x4", {}, 32, [256], [256, 8, 8], None),
]
LARGE = [
    ("timm", "swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, 64, [768], [768, 2, 2], None),
    ("timm", "mambaout_femto", {}, 64, [1152], [288, 2, 2], None),
    ("timm", "efficientnet_b0", {}, 64, [1280], [1280, 2, 2], None),
    ("timm", "convnext_atto", {}, 64, [320], [320, 2, 2], None),
    ("timm", "crossvit_tiny_240", {}, 240, [288], None, None),
    ("timm", "cait_xxs24_224", {"img_size": 32, "depth": 1}, 32, [192], [5, 192], 1),
    ("timm", "xcit_nano_12_p16_224", {"depth": 1}, 32, [128], [5, 128], 1),
    ("timm", "volo_d1_224", {"img_size": 32}, 32, [384], [5, 384], 1),
    ("timm", "hiera_tiny_224", {"img_size": 64}, 64, [768], [4, 768], 0),
    ("timm", "levit_128s", {}, 224, [384], [16, 384], 0),
    ("timm", "mixer_s32_224", {"img_size": 64}, 64, [512], [4, 512], 0),
    ("timm", "pit_ti_224", {}, 224, [256], None, None),
    ("timm", "vgg11", {}, 32, [4096], [512, 1, 1], None),
    ("torchvision", "mobilenet_v2", {}, 64, [1280], [1280, 2, 2], None),
    ("torchvision", "efficientnet_b0", {}, 64, [1280], [1280, 2, 2], None),
    ("torchvision", "convnext_tiny", {}, 64, [768], [768, 2, 2], None),
    ("torchvision", "vit_b_16", {"image_size": 32}, 32, [768], [5, 768], 1),
    ("torchvision", "swin_t", {}, 64, [768], [768, 2, 2], None),
    ("torchvision", "densenet121", {}, 64, [1024], [1024, 2, 2], None),
    ("torchvision", "vgg11", {}, 64, [4096], [512, 2, 2], None),
    ("torchvision", "alexnet", {}, 64, [4096], [256, 1, 1], None),
    ("torchvision", "googlenet", {}, 64, [1024], [1024, 2, 2], None),
    ("torchvision", "inception_v3", {}, 96, [2048], [2048, 1, 1], None),
    ("torchvision", "mnasnet0_5", {}, 64, [1280], [1280, 2, 2], None),
    ("torchvision", "regnet_y_400mf", {}, 64, [440], [440, 2, 2], None),
    ("torchvision", "maxvit_t", {}, 224, [512], [512, 7, 7], None),
]


def opened(library: str, name: str, kwargs: dict[str, Any] | None = None) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_model(ModelSettings.model_validate({library: name, "num_classes": 0, "kwargs": kwargs or {}}))
    assert isinstance(model, Backbone)
    return model


def images_of(size: int, number: int = 2) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))


def check(
    library: str,
    name: str,
    kwargs: dict[str, Any],
    size: int,
    pooled: list[int],
    spatial: list[int] | None,
    prefix: Any,
) -> None:
    """Shapes in both modes, prefix tokens, and a gradient for every parameter that is trained."""
    model = opened(library, name, kwargs)
    expected = {"pooled": [2, *pooled]} | ({} if spatial is None else {"spatial": [2, *spatial]})
    for mode in (False, True):
        outputs = model.train(mode)(images_of(size))
        assert {key: list(value.shape) for key, value in outputs.items()} == expected
    if spatial is not None and len(spatial) == 2:
        assert num_prefix_tokens(model) == prefix
    sum(output.square().mean() for output in outputs.values()).backward()
    without = [key for key, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert not without  # DDP waits for them


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case[0]}-{case[1]}")
def test_outputs(case: tuple[Any, ...]) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case[0]}-{case[1]}")
def test_outputs_of_more_networks(case: tuple[Any, ...]) -> None:
    check(*case)


@pytest.mark.parametrize(("library", "name"), [("timm", "test_resnet"), ("torchvision", "resnet18")])
def test_pooled_is_what_the_head_gets(library: str, name: str) -> None:
    settings = ModelSettings.model_validate({library: name, "num_classes": 5})
    whole = open_model(settings).eval()
    state = whole.state_dict()
    trunk = opened(library, name).eval()
    trunk.trunk.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")}, strict=False)
    pooled = trunk(images_of(64))["pooled"]
    torch.testing.assert_close(pooled @ state["fc.weight"].T + state["fc.bias"], whole(images_of(64)))


def test_pooled_is_the_mean_of_spatial() -> None:
    outputs = opened("torchvision", "resnet18").eval()(images_of(96))
    torch.testing.assert_close(outputs["spatial"].mean(dim=(2, 3)), outputs["pooled"])


def test_map_without_pooling() -> None:
    assert list(opened("timm", "test_resnet", {"global_pool": ""})(images_of(64))) == ["spatial"]


def test_encoder_without_pooling() -> None:
    class Encoder(nn.Module):
        """As those of timm, which have no classifier."""

        def forward_features(self, images: Tensor) -> Tensor:
            return images

        def forward_head(self, features: Tensor) -> Tensor:
            raise NotImplementedError

        def forward(self, images: Tensor) -> Tensor:
            return self.forward_features(images)

    assert list(Backbone(Encoder())(images_of(8))) == ["spatial"]


def test_network_of_ones_own() -> None:
    class Own(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor | None]:
            return {"last_hidden_state": images.flatten(2), "pooler_output": images.mean((2, 3)), "attentions": None}

    assert list(Backbone(Own())(images_of(8))) == ["last_hidden_state", "pooler_output"]
    assert list(Backbone(nn.Flatten())(images_of(8))) == ["pooled"]


def test_network_without_linear_layer() -> None:
    with pytest.raises(ConfigError, match="SqueezeNet has no linear layer at its end to leave out; use another"):
        opened("torchvision", "squeezenet1_1")


@pytest.mark.parametrize(
    ("tokens", "config", "expected"),
    [
        ({"cls_token": [1, 1, 4]}, None, 1),
        ({"cls_token": [1, 1, 4]}, 4, 5),
        ({"cls_token": [1, 1, 4], "register_tokens": [1, 3, 4]}, 3, 4),
        ({"cls_token": [1, 1, 4], "distillation_token": [1, 1, 4]}, None, 2),
        ({"class_embedding": [4]}, None, 1),
        ({"position_embeddings": [1, 5, 4]}, None, None),
    ],
)
def test_prefix_tokens_as_of_hugging_face(
    tokens: dict[str, list[int]], config: int | None, expected: int | None
) -> None:
    network = nn.Module()
    network.embeddings = nn.Module()
    for name, shape in tokens.items():
        network.embeddings.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    network.config = SimpleNamespace(num_register_tokens=config)  # type: ignore[assignment]
    assert num_prefix_tokens(Backbone(network)) == expected


def test_prefix_tokens_of_layers() -> None:
    vit = opened("timm", "vit_tiny_patch16_224", TINY_VIT)
    assert [num_prefix_tokens(vit, name) for name in ("spatial", "blocks.0", "stage:-1", "patch_embed")] == [1, 1, 1, 0]
    cait = opened("timm", "cait_xxs24_224", {"img_size": 32, "depth": 1})
    names = ("spatial", "norm", "blocks_token_only.1", "blocks.0", "stage:0")
    assert [num_prefix_tokens(cait, name) for name in names] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(("library", "name"), [("timm", "test_resnet"), ("torchvision", "resnet18")])
def test_copies_do_not_share(library: str, name: str) -> None:
    model = opened(library, name).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    first, second = model(images_of(64)), twin(images_of(64))
    assert first["pooled"].abs().sum() > 0 and second["pooled"].abs().sum() == 0
    assert second["spatial"].abs().sum() == 0


def test_channels_last() -> None:
    model, images = opened("torchvision", "resnet18").eval(), images_of(64)
    expected = model(images)
    found = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    for name, output in found.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "kwargs"),
    [
        ("torchvision", "resnet18", {}),
        ("timm", "test_vit", {"img_size": 32}),
        ("torchvision", "shufflenet_v2_x0_5", {}),
    ],
)
def test_compiled_as_one_graph(library: str, name: str, kwargs: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = opened(library, name, kwargs).eval()
    expected = model(images_of(32))
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(images_of(32))
    for key, output in found.items():
        torch.testing.assert_close(output, expected[key])


STRICT = [
    case[:3]
    for case in (*SMALL, *LARGE)
    # torchvision cannot build its EfficientNet without classes: it divides by their number.
    if case[0] in ("timm", "torchvision") and case[:2] != ("torchvision", "efficientnet_b0")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", STRICT, ids=lambda case: f"{case[0]}-{case[1]}")
def test_trunk_loads_strictly_in_its_library(case: tuple[str, str, dict[str, Any]]) -> None:
    library, name, kwargs = case
    state = trunk_of(opened(*case)).state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if library == "timm":
            again: nn.Module = timm.create_model(name, num_classes=0, **kwargs)
        else:
            has_auxiliary = name in ("googlenet", "inception_v3")
            more = {"aux_logits": False, "init_weights": False} if has_auxiliary else {}
            again = torchvision.models.get_model(name, num_classes=0, **kwargs, **more)
    again.load_state_dict(state, strict=True)


def test_head_of_zero_size_is_not_trained() -> None:
    model = without_head(torchvision.models.resnet18())
    assert model.fc.weight.shape == (0, 512) and not model.fc.weight.requires_grad and not model.fc.bias.requires_grad
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if not name.startswith("fc."))


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), [("timm", "test_resnet"), ("torchvision", "mobilenet_v3_small")])
def test_trained_by_ddp(library: str, name: str, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(opened(library, name))
        for _ in range(2):  # the second step fails if a parameter had no gradient in the first
            outputs = model(images_of(64))
            sum(output.square().mean() for output in outputs.values()).backward()
    finally:
        torch.distributed.destroy_process_group()
