"""Small models whose outputs differ between train and eval mode."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline.batch import KDBatch
from kd_pipeline.models.backbone import Backbone

NUM_CLASSES = 10
IMAGE_SHAPE = (3, 32, 32)
VIT_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 2}
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


def vit_backbone(seed: int = 0) -> Backbone:
    """A ViT of timm without a head: `pooled` `[N, 32]`, and `spatial` `[N, 1 + 2 + 16, 32]` with 3 prefix tokens."""
    return _backbone("vit_tiny_patch16_224", seed, **VIT_SIZES)


def cnn_backbone(seed: int = 0) -> Backbone:
    """A ResNet of timm without a head: `pooled` `[N, 96]`, and `spatial` `[N, 96, 2, 2]`."""
    return _backbone("test_resnet", seed, output_stride=16)


def _backbone(name: str, seed: int, **sizes: Any) -> Backbone:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backbone(timm.create_model(name, num_classes=0, **sizes))


class ModelOutput(OrderedDict):
    """A mapping as `transformers.utils.ModelOutput`: its values are attributes too, and some have none."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class HuggingFaceLike(nn.Module):
    """A vision transformer that returns what those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = vit_backbone().trunk

    def forward(self, images: Tensor) -> ModelOutput:
        tokens = self.trunk.forward_features(images)
        pooled = tokens[:, 0].tanh()
        return ModelOutput(last_hidden_state=tokens, pooler_output=pooled, hidden_states=None, attentions=None)


def random_images(num_images: int, *, seed: int = 0, shape: tuple[int, int, int] = IMAGE_SHAPE) -> Tensor:
    """`[num_images, *shape]` float32 normal noise."""
    return torch.randn(num_images, *shape, generator=torch.Generator().manual_seed(seed))


def unlabeled_batch(images: Tensor, teacher: Mapping[str, Tensor]) -> KDBatch:
    """`images` with a teacher's outputs, all rows valid."""
    num_images = len(images)
    return KDBatch(
        images=images,
        labels=None,
        index=torch.arange(num_images),
        valid=torch.ones(num_images, dtype=torch.bool),
        teacher=teacher,
    )


class PixelNet(nn.Module):
    """A small U-Net; returns logits of the pixels, `[N, K, H, W]`, as `output`, as torchvision's networks do."""

    def __init__(self, num_classes: int = NUM_CLASSES, *, width: int = 8, output: str = "out", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.down = _block(3, width)
            self.bottom = nn.Sequential(nn.MaxPool2d(2), _block(width, 2 * width))
            self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
            self.merge = _block(2 * width, width)
            self.head = nn.Conv2d(width, num_classes, 1)
        self.output = output

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.down(images)
        return {self.output: self.head(self.merge(torch.cat([fine, self.up(self.bottom(fine))], 1)))}


def _block(num_inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(num_inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
