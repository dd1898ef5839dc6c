"""Weights by order, as far as they fit, and of RGB networks for other channels."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.registry import ModelSettings, open_model

NAME = "test_resnet"
HERE = f"{__name__}:fixed"


class Renamed(nn.Module):
    """The layers of `fixed` by other names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.classifier = nn.Linear(16, 5)


def fixed(num_classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, num_classes))


def opened(content: Any, folder: Path, **settings: Any) -> nn.Module:
    torch.save(content, folder / "a.pt")
    arguments: dict[str, Any] = {"factory": HERE, "checkpoint": folder / "a.pt"} | settings
    return open_model(ModelSettings(**arguments), plugins=[__name__])


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_weights_by_order(tmp_path: Path) -> None:
    trained = Renamed().state_dict()
    content = {"epoch": 3, "model": trained, "optimizer": {"state": {0: torch.ones(3)}}}
    found = opened(content, tmp_path, checkpoint_match="order").state_dict()
    assert equal(list(found.values()), list(trained.values()))
    with pytest.raises(ConfigError, match="missing"):
        opened(content, tmp_path)


def test_order_that_differs_is_refused(tmp_path: Path) -> None:
    state = Renamed().state_dict()
    swapped = dict(sorted(state.items()))
    with pytest.raises(ConfigError, match=r"tensor 0 is \[5\] in the file, and 0.weight is \[4, 3, 3, 3\]"):
        opened(swapped, tmp_path, checkpoint_match="order")
    del state["classifier.bias"]
    with pytest.raises(ConfigError, match="it has 7 tensors, and the network 8"):
        opened(state, tmp_path, checkpoint_match="order")
    save_file(Renamed().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="safetensors, which sorts its tensors"):
        opened(state, tmp_path, checkpoint_match="order", checkpoint=tmp_path / "a.safetensors")


def test_weights_as_far_as_they_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="kd_pipeline")
    trained = {**fixed(num_classes=9).state_dict(), "more.weight": torch.ones(2)}
    del trained["1.weight"]
    found = opened(trained, tmp_path, checkpoint_match="fitting").state_dict()
    assert torch.equal(found["0.weight"], trained["0.weight"]) and found["3.weight"].shape == (5, 16)
    assert "6 tensors fit Sequential, and 3 of it keep their initial values: 1.weight, 3.weight" in caplog.text
    with pytest.raises(ConfigError, match=r"no tensor of .* has the name and the shape"):
        opened(Renamed().state_dict(), tmp_path, checkpoint_match="fitting")


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="checkpoint_match: order has no effect without a checkpoint"):
        ModelSettings(factory=HERE, checkpoint_match="order")
    with pytest.raises(ValidationError, match="checkpoint_match: fitting has no effect together with reset"):
        ModelSettings(factory=HERE, checkpoint_match="fitting", checkpoint=tmp_path, reset=("3",))


@pytest.mark.parametrize("channels", [1, 4])
def test_first_layer_for_other_channels_is_that_of_timm(tmp_path: Path, channels: int) -> None:
    """One channel gives what the same image gives in three channels."""
    trained = timm.create_model(NAME, num_classes=5).eval()
    settings = {"factory": None, "timm": NAME, "num_classes": 5, "kwargs": {"in_chans": channels}}
    found = opened(trained.state_dict(), tmp_path, **settings).eval()
    images = torch.randn(2, 1, 32, 32)
    if channels == 1:
        torch.testing.assert_close(found(images), trained(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    expected = timm.models.adapt_input_conv(channels, trained.conv1[0].weight)
    torch.testing.assert_close(found.conv1[0].weight, nn.Parameter(expected))
