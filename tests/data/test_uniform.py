"""`is_uniform`: images of a single color."""

import torch

from kd_pipeline.data.uniform import UniformCounter, counted, is_uniform


def test_one_color_per_image() -> None:
    images = torch.rand(1, 3, 1, 1).expand(4, 3, 17, 19).clone()
    images[1, 2, 16, 18] += 1  # between the pixels that are looked at first
    images[2, 0, 8, 8] += 1
    images[3] = torch.rand(3, 17, 19)
    assert is_uniform(images).tolist() == [True, False, False, False]


def test_nan_is_not_a_color() -> None:
    assert not is_uniform(torch.full((1, 3, 8, 8), float("nan"))).any()


def test_no_images() -> None:
    assert is_uniform(torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_counter_counts_valid_images() -> None:
    counter = UniformCounter()
    assert counter.read() == (0, 0)
    images = torch.rand(4, 3, 70, 90)
    images[1:] = 0.5
    images[3, 2, 69, 89] = 0.25
    for _ in range(2):
        counter.add(counted(is_uniform(images), torch.tensor([True, True, False, True])))
    assert counter.read() == (2, 6)
