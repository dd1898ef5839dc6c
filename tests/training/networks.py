"""Networks for the tiny runs, by `factory` or directly."""

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn


def plain(num_classes: int = 10, width: int = 8) -> nn.Module:
    """For images of 8x8. Without BatchNorm, so the gradient of an image does not depend on the rest of its batch."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, num_classes)
    )


class _Trunk(nn.Module):
    """Returns features by name, of a grid of 2 x 2 for images of 8x8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        spatial = self.second(self.first(images).relu())
        return {"pooled": spatial.mean((2, 3)), "spatial": spatial}


def trunk(num_classes: int = 0, width: int = 8) -> nn.Module:
    """Without a head, and without BatchNorm as above."""
    assert num_classes == 0
    return _Trunk(width)


def with_batchnorm(num_classes: int = 10, width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, num_classes),
    )


class _Put(nn.Module):
    """Uses an operation that torch counts as nondeterministic."""

    def forward(self, features: Tensor) -> Tensor:
        return features + torch.zeros(2).put_(torch.tensor([0]), torch.tensor([0.0]))[0]


def nondeterministic(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(plain(num_classes), _Put())


class _PutBackward(torch.autograd.Function):
    """The same, in the backward pass alone, as most of these operations are."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.zeros(2).put_(torch.tensor([0]), torch.tensor([0.0]))[0]


class _WithPutBackward(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = _PutBackward.apply(features)
        return found


def nondeterministic_backward(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(plain(num_classes), _WithPutBackward())


def with_dropout(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(with_batchnorm(num_classes)[:4], nn.Dropout(0.3), nn.Linear(128, num_classes))


class _Brightened(nn.Module):
    """Changes its input in place."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mul_(1.5)


def in_place(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(_Brightened(), plain(num_classes))


class _Failing(nn.Module):
    """Raises an error in the training pass of this number, counted from 0."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.num_passes = number, 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.num_passes += 1
            if self.num_passes - 1 == self.number:
                raise OSError("no more")
        return images


def failing(num_classes: int = 10, at: int = 2) -> nn.Module:
    return nn.Sequential(_Failing(at), plain(num_classes))


observed_dtypes: set[torch.dtype] = set()
"""The dtypes in which `observed` networks computed during training."""


def observed(num_classes: int = 10) -> nn.Module:
    network = plain(num_classes)

    def observe(layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training:
            observed_dtypes.add(output.dtype)

    network[0].register_forward_hook(observe)
    return network


class FakeClock:
    """Time that passes only in `Timed` networks; takes the place of the module `time`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


CLOCK = FakeClock()


class Timed(nn.Sequential):
    """A `plain` network whose forward pass takes seconds of `CLOCK`: in training, the given ones in turn."""

    def __init__(self, num_classes: int, train_s: Iterable[float], eval_s: float) -> None:
        super().__init__(*plain(num_classes))
        self.train_s, self.eval_s = cycle(train_s), eval_s

    def forward(self, images: Tensor) -> Tensor:
        CLOCK.now_s += next(self.train_s) if self.training else self.eval_s
        return super().forward(images)


def timed_student(num_classes: int = 10) -> nn.Module:
    return Timed(num_classes, (1, 3), 100)


def timed_teacher(num_classes: int = 10) -> nn.Module:
    return Timed(num_classes, (), 3)


class Spoiled(nn.Module):
    """Returns NaN in the training passes that `SPOILED` lists, counted from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.num_passes = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.num_passes += 1
            if self.num_passes - 1 in SPOILED:
                return images * torch.nan
        return images


SPOILED: set[int] = set()


def spoiled(num_classes: int = 10) -> nn.Module:
    """With BatchNorm, whose statistics a single NaN would spoil for good."""
    return nn.Sequential(Spoiled(), with_batchnorm(num_classes))


def with_key(num_classes: int = 10, api_key: str = "", uri: str = "") -> nn.Module:
    """Of somebody who downloads weights."""
    assert api_key and uri and "***" not in api_key + uri
    return plain(num_classes)


class _WithHead(nn.Module):
    """Returns the logits of a second head too."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = plain(num_classes)
        self.aux = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.net[:3](images)
        return {"logits": self.net[3](features), "aux": self.aux(features)}


def with_head(num_classes: int = 10) -> nn.Module:
    return _WithHead(num_classes)
