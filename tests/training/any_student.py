"""Networks for images of 8x8 that return whatever a network may return, by `factory`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput


class Returns(nn.Module):
    """A convolution and a head; `give` makes the return value of logits and hidden map."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any], num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(128, num_classes)
        self.give = give

    def forward(self, images: Tensor) -> Any:
        hidden = self.first(images).relu()
        return self.give(self.head(hidden.flatten(1)), hidden)


def a_tensor(num_classes: int = 10) -> nn.Module:
    return Returns(lambda logits, hidden: logits, num_classes)


def a_tuple(num_classes: int = 10) -> nn.Module:
    return Returns(lambda logits, hidden: (logits, hidden), num_classes)


def a_mapping(num_classes: int = 10) -> nn.Module:
    return Returns(lambda logits, hidden: {"logits": logits, "features": {"hidden": hidden}}, num_classes)


def a_model_output(num_classes: int = 10) -> nn.Module:
    return Returns(
        lambda logits, hidden: ImageClassifierOutput(logits=logits, hidden_states=(hidden, hidden)),  # type: ignore[arg-type]
        num_classes,
    )


class ReturnsLosses(Returns):
    """Returns a loss `size` of its own, in training mode, or always."""

    def __init__(self, num_classes: int, *, always: bool) -> None:
        super().__init__(self._give, num_classes)
        self.always = always

    def _give(self, logits: Tensor, hidden: Tensor) -> Any:
        if self.training or self.always:
            return {"logits": logits, "losses": {"size": hidden.square().mean(), "unused": logits.mean()}}
        return {"logits": logits}


def with_losses(num_classes: int = 10) -> nn.Module:
    return ReturnsLosses(num_classes, always=True)


def with_training_losses(num_classes: int = 10) -> nn.Module:
    return ReturnsLosses(num_classes, always=False)


class Both(nn.Module):
    """Both networks with a forward pass of their own, which returns logits and a loss."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.student, self.teacher = a_tensor(num_classes), a_tensor(num_classes)
        self.teacher.append = nn.BatchNorm1d(num_classes)  # would change in training mode
        self.scale = nn.Linear(num_classes, num_classes)

    def forward(self, images: Tensor) -> dict[str, Any]:
        logits = self.student(images)
        wanted = self.teacher.append(self.teacher(images))
        return {"logits": logits, "losses": {"match": (self.scale(logits) - wanted).square().mean()}}


def both(num_classes: int = 10) -> nn.Module:
    return Both(num_classes)


def vit(num_classes: int = 10) -> nn.Module:
    """A tiny ViT of Hugging Face with random weights, which returns its hidden states too."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=num_classes,
        output_hidden_states=True,
    )
    return ViTForImageClassification(config)  # type: ignore[no-any-return]


def teacher_vit(num_classes: int = 10) -> nn.Module:
    """Has the same weights whenever it is built."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return vit(num_classes)


def resnet(num_classes: int = 10) -> nn.Module:
    """A tiny ResNet of Hugging Face with random weights."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=num_classes
    )
    return ResNetForImageClassification(config)  # type: ignore[no-any-return]
