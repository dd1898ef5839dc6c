"""A teacher that was opened for each of several sizes."""

import pytest
import torch
from torch import nn

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.pytorch import PyTorchTeacher
from kd_pipeline.teachers.sized import SizedTeacher


def open_sized(*sizes: int) -> tuple[SizedTeacher, dict[tuple[int, int], PyTorchTeacher]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    opened = {(size, 2 * size): PyTorchTeacher(network, image_shape=(3, size, 2 * size)) for size in sizes}
    return SizedTeacher(opened), opened


def test_each_batch_is_run_by_the_teacher_of_its_size() -> None:
    sized, opened = open_sized(8, 16)
    for (height, width), teacher in opened.items():
        images = torch.rand(5, 3, height, width)
        assert torch.equal(sized(images)["logits"], teacher(images)["logits"])
        assert teacher.num_calls == 2
    assert sized.outputs == teacher.outputs and sized.images.shape == (None, 3, None, None)


def test_other_sizes_are_refused() -> None:
    sized, _ = open_sized(8, 16)
    with pytest.raises(TeacherError, match="it is open for images of 8 x 16, 16 x 32"):
        sized(torch.rand(1, 3, 16, 16))


def test_sizes_of_maps_are_open() -> None:
    class Maps(nn.Module):
        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"map": images[:, :2]}

    sized = SizedTeacher({(size, size): PyTorchTeacher(Maps(), image_shape=(3, size, size)) for size in (8, 16)})
    assert sized.outputs["map"].shape == (None, 2, None, None)


def test_closing_closes_all() -> None:
    sized, opened = open_sized(8, 16)
    sized.close()
    for (height, width), teacher in opened.items():
        with pytest.raises(TeacherError, match="closed"):
            teacher(torch.rand(1, 3, height, width))
