"""Small models whose outputs differ between train and eval mode."""

import torch
from torch import Tensor, nn

NUM_CLASSES = 10
IMAGE_SHAPE = (3, 32, 32)
CLASSES = tuple(f"class {index}" for index in range(NUM_CLASSES))


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm, dropout and a linear head; returns logits and features `[N, 32, 8, 8]`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(inplace=True),
                nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(inplace=True),
            )
            self.dropout = nn.Dropout(0.5)
            self.head = nn.Linear(32, NUM_CLASSES)
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.running_mean.normal_(0.0, 0.3)
                    layer.running_var.uniform_(0.3, 1.5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {"logits": self.head(self.dropout(features.mean((2, 3)))), "features": features}


class LogitsOnly(nn.Module):
    """A `ConvNet` that returns a plain tensor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = ConvNet(seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)["logits"]


def random_images(num_images: int, *, seed: int = 0, shape: tuple[int, int, int] = IMAGE_SHAPE) -> Tensor:
    """`[num_images, *shape]` float32 normal noise."""
    return torch.randn(num_images, *shape, generator=torch.Generator().manual_seed(seed))
