"""The student trains in channels-last order where that is faster and possible."""

import logging

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import is_channels_last
from kd_pipeline.training.memory_format import ChannelsLast, use_channels_last

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(10))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.LazyLinear(10))


def patches() -> nn.Module:
    """The only convolution of a vision transformer."""
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.LazyLinear(10))


def skipping(channels: int) -> nn.Module:
    """As the shortcut of a residual block."""
    shortcut = nn.Conv2d(channels, 16, 1, stride=2)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), shortcut, nn.Flatten(), nn.LazyLinear(10))


class Viewing(nn.Module):
    """As networks were once written: it needs maps in the usual order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return maps.view(len(maps), -1)


def prepared(student: nn.Module, setting: ChannelsLast, device: torch.device = CPU, *, is_half: bool = False) -> bool:
    """Whether the student is put in channels-last order."""
    student(torch.zeros(2, 3, 8, 8))
    use_channels_last(student, setting, example={"images": torch.zeros(2, 3, 8, 8)}, device=device, is_half=is_half)
    assert student.training
    return is_channels_last(student)


@pytest.mark.parametrize(
    ("student", "device", "is_half", "wanted"),
    [
        (convolutional(), CPU, False, True),
        (convolutional(), CPU, True, True),
        (convolutional(), GPU, False, False),
        (convolutional(), GPU, True, True),
        (depthwise(), CPU, False, True),
        (depthwise(), CPU, True, False),
        (depthwise(), GPU, True, True),
        (patches(), CPU, True, False),
        (skipping(8), CPU, False, False),
        (skipping(8), CPU, True, False),
        (skipping(8), GPU, True, True),
        (skipping(16), CPU, False, True),
        (patches(), GPU, True, False),
    ],
)
def test_auto(student: nn.Module, device: torch.device, is_half: bool, wanted: bool) -> None:
    assert prepared(student, "auto", device, is_half=is_half) == wanted


def test_setting_decides() -> None:
    assert prepared(patches(), True)
    assert not prepared(convolutional(), False)


def test_student_that_cannot(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    assert not prepared(Viewing(), "auto")
    (message,) = caplog.messages
    assert "the student does not train in channels-last order" in message and "view" in message
    with pytest.raises(ConfigError, match=r"train\.channels_last: the student fails .* set train.channels_last: false"):
        prepared(Viewing(), True)


def test_same_result() -> None:
    torch.manual_seed(0)
    student = convolutional()
    images = torch.rand(4, 3, 8, 8)
    wanted = student(images)
    use_channels_last(student, True, example={"images": torch.zeros(2, 3, 8, 8)}, device=CPU, is_half=False)
    torch.testing.assert_close(student(images.to(memory_format=torch.channels_last)), wanted)
