"""Small residual networks for small images."""

from collections import OrderedDict

from torch import Tensor, nn

from kd_pipeline.errors import ConfigError

__all__ = ["cifar_resnet", "create_builtin", "small_resnet"]


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., arXiv 1512.03385, figure 2); projection only where needed."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn_relu(num_in, num_out, stride),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = nn.functional.relu(self.body(images) + self.shortcut(images))
        return out


def small_resnet(num_classes: int, *, width: int, num_stages: int = 3, in_channels: int = 3) -> nn.Sequential:
    """A residual network for images of about 32 pixels: `[N, in_channels, H, W]` to logits `[N, num_classes]`.

    Each of the `num_stages` stages halves the resolution and doubles the number of channels, which starts at `width`.
    """
    widths = [width * 2**stage for stage in range(num_stages)]
    stem = _conv_bn_relu(in_channels, width)
    stages = [_BasicBlock(num_in, num_out, stride=2) for num_in, num_out in zip([width, *widths], widths, strict=False)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def cifar_resnet(depth: int, num_classes: int, *, width: int = 32, in_channels: int = 3) -> nn.Module:
    """A wide residual network of depth 6n + 2 for 32x32 images (He et al., arXiv 1512.03385, section 4.2).

    The stem has `width` channels and the three stages have 2, 4 and 8 times as many: a width of 32 gives the networks
    that Tian et al. (arXiv 1910.10699) call resnet8x4 and resnet32x4. Layers are called `stem`, `layer1` to `layer3`
    and `head`.

    Raises:
        ConfigError: the depth is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ConfigError(f"the depth of a residual network for CIFAR is 8, 14, 20, ..., got {depth}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*_conv_bn_relu(in_channels, width)))
    num_in = width
    for number in (1, 2, 3):
        num_out = width * 2**number
        first = _BasicBlock(num_in, num_out, stride=1 if number == 1 else 2)
        rest = (_BasicBlock(num_out, num_out, stride=1) for _ in range((depth - 2) // 6 - 1))
        layers[f"layer{number}"] = nn.Sequential(first, *rest)
        num_in = num_out
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["head"] = nn.Linear(num_in, num_classes)
    model = nn.Sequential(layers)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model


def create_builtin(name: str, *, num_classes: int = 10, width: int = 32, in_channels: int = 3) -> nn.Module:
    """The model called `name` in `ModelSettings.builtin`."""
    match name:
        case "resnet8x4":
            return cifar_resnet(8, num_classes, width=width, in_channels=in_channels)
        case "resnet32x4":
            return cifar_resnet(32, num_classes, width=width, in_channels=in_channels)
    return small_resnet(num_classes, width=width, in_channels=in_channels)


def _conv_bn_relu(num_in: int, num_out: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution, batch normalization and ReLU."""
    return [nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]
