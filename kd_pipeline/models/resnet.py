"""Small residual networks for small images."""

from torch import Tensor, nn

from kd_pipeline.errors import ConfigError

__all__ = ["builtin", "cifar_resnet", "small_resnet"]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385, figure 2), the identity where it can be."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = nn.functional.relu(self.body(images) + self.shortcut(images))
        return out


def small_resnet(num_classes: int, *, width: int, num_stages: int = 3) -> nn.Sequential:
    """A residual network for images of about 32 pixels: `[N, 3, H, W]` to logits `[N, num_classes]`.

    Each of the `num_stages` stages halves the resolution and doubles the number of channels, `width` at first.
    """
    widths = [width * 2**stage for stage in range(num_stages)]
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    stages = [_Block(num_in, num_out, stride=2) for num_in, num_out in zip([width, *widths], widths, strict=False)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def cifar_resnet(depth: int, num_classes: int, *, width: int = 32) -> nn.Module:
    """The residual network of depth 6n + 2 for 32x32 images (He et al., arXiv 1512.03385, section 4.2), made wider.

    The stem has `width` channels and the three stages have 2, 4 and 8 times as many: with 32 these are the networks
    that Tian et al. (arXiv 1910.10699) call resnet8x4 and resnet32x4. Layers are called `stem`, `layer1` to `layer3`
    and `head`.
    """
    if depth < 8 or depth % 6 != 2:
        raise ConfigError(f"the depth of a residual network for CIFAR is 8, 14, 20, ..., got {depth}")
    stages: dict[str, nn.Module] = {}
    num_in = width
    for number in (1, 2, 3):
        num_out, stride = width * 2**number, 1 if number == 1 else 2
        blocks = [
            _Block(num_in if block == 0 else num_out, num_out, stride if block == 0 else 1)
            for block in range((depth - 2) // 6)
        ]
        stages[f"layer{number}"] = nn.Sequential(*blocks)
        num_in = num_out
    net = nn.Sequential()
    net.add_module(
        "stem", nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    )
    for name, stage in stages.items():
        net.add_module(name, stage)
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("head", nn.Linear(num_in, num_classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


def builtin(name: str, *, num_classes: int = 10, width: int = 32) -> nn.Module:
    """The network that `ModelSettings.builtin` names."""
    match name:
        case "resnet8x4":
            return cifar_resnet(8, num_classes, width=width)
        case "resnet32x4":
            return cifar_resnet(32, num_classes, width=width)
    return small_resnet(num_classes, width=width)
