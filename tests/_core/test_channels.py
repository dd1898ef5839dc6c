"""Means and standard deviations of channels: three values, for pixels from 0 to 1."""

import pytest
from pydantic import ValidationError

from kd_pipeline._core.channels import ChannelMeans, ChannelStds
from kd_pipeline._core.settings import Settings


class Example(Settings):
    mean: ChannelMeans = (0.0, 0.0, 0.0)
    std: ChannelStds = (1.0, 1.0, 1.0)


USUAL = {
    "ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "CLIP": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "Inception": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "MNIST": ([0.1307] * 3, [0.3081] * 3),
    "none": ([0, 0, 0], [1, 1, 1]),
    "back to 0..255": ([0.4, 0.4, 0.4], [1 / 255] * 3),
    "negative": ([-0.5, 0, 1], [2, 2, 2]),
}


@pytest.mark.parametrize(("mean", "std"), USUAL.values(), ids=USUAL)
def test_usual_values_pass(mean: list[float], std: list[float]) -> None:
    for values in (list, tuple):
        read = Example.model_validate({"mean": values(mean), "std": values(std)})
        assert read.mean == tuple(mean) and read.std == tuple(std)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mean": [123.675, 116.28, 103.53]}, "divide by 255: [0.485, 0.456, 0.406]; std is on the same scale"),
        ({"mean": [127.5, 127.5, 127.5]}, "divide by 255: [0.5, 0.5, 0.5]"),
        ({"mean": [0, 0, 33.3]}, "[0.0, 0.0, 33.3] is for pixels from 0 to 255"),
        ({"mean": [-123.675, -116.28, -103.53]}, "is for pixels from 0 to 255"),
        ({"std": [58.395, 57.12, 57.375]}, "divide by 255: [0.229, 0.224, 0.225]"),
        ({"std": [255, 255, 255]}, "divide by 255: [1.0, 1.0, 1.0]"),
        ({"std": [0.2, 0, 0.2]}, "should be greater than 0"),
        ({"std": [-0.2, 0.2, 0.2]}, "should be greater than 0"),
        ({"mean": 0.5}, "needs three values, for red, green and blue: [0.5, 0.5, 0.5]"),
        ({"mean": [0.1307]}, "found 1: [0.1307]; repeat it for gray images: [0.1307, 0.1307, 0.1307]"),
        ({"std": [0.2, 0.2]}, "needs three values, for red, green and blue, found 2"),
        ({"std": [0.2] * 4}, "found 4"),
        ({"mean": []}, "found 0"),
        ({"mean": "0.5"}, "should be a valid tuple"),
    ],
)
def test_other_values_are_refused_with_the_right_ones(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as info:
        Example.model_validate(values)
    (error,) = info.value.errors()
    assert words in error["msg"]


def test_advised_values_pass() -> None:
    assert Example(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).mean[0] == 0.485
