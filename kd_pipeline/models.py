"""Small networks for small images."""

from torch import Tensor, nn

__all__ = ["small_resnet"]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385, figure 2)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
        )
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
