"""Functions that return sources, by `factory`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from kd_pipeline.data.sources import BaseSource

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(BaseSource):
    """Images of 8x8 in scikit-learn's own array."""

    def __init__(self, first: int = 0, count: int = 96, classes: Sequence[str] | None = None) -> None:
        digits = load_digits()
        self.stored = digits.images[first : first + count]
        super().__init__(count, digits.target[first : first + count], classes=classes, name="digits")

    def pixels(self, index: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = (self.stored[index] * 255 / 16).round().astype(np.uint8)
        return pixels


def digits(first: int, count: int) -> Digits:
    return Digits(first, count)


def named_digits(first: int, count: int, classes: Sequence[str] | None = None) -> Digits:
    return Digits(first, count, classes or NAMES)


def reversed_digits(first: int, count: int) -> Digits:
    return Digits(first, count, NAMES[::-1])


def no_source() -> list[int]:
    return [1, 2]


def failing() -> BaseSource:
    raise OSError("the database does not answer")
