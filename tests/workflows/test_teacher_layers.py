"""A student starts from layers of its teacher, by name or by their place in a list."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.config.teacher_layers import TeacherLayers
from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows.teacher_layers import copy_layers


class Blocks(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(number))


def started(number: int, **sources: Any) -> tuple[Blocks, Blocks]:
    student, teacher = Blocks(number), Blocks(6)
    copy_layers(student, teacher, Config(student_from_teacher=sources).student_from_teacher)
    return student, teacher


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(*pair) for pair in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("choice", "taken"),
    [
        ({"first": 3}, [0, 1, 2]),
        ({"last": 3}, [3, 4, 5]),
        ({"every": 2}, [0, 2, 4]),
        ({"keep": [0, 3, -1]}, [0, 3, 5]),
        ({"every": 1}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_layers_by_their_place(choice: dict[str, Any], taken: list[int]) -> None:
    student, teacher = started(len(taken), blocks={"layers": "blocks", **choice})
    assert all(same(own, teacher.blocks[number]) for own, number in zip(student.blocks, taken, strict=True))
    assert not same(student.stem, teacher.stem)


def test_layers_by_name_and_place() -> None:
    student, teacher = started(2, **{"stem": "stem", "blocks": {"layers": "blocks", "last": 2}})
    assert same(student.stem, teacher.stem) and same(student.blocks, teacher.blocks[-2:])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"blocks": {"layers": "blocks", "every": 3}}, r"2 of the 6 layers .* \(0, 3\), .* has 4 in 'blocks'"),
        ({"blocks": {"layers": "blocks", "first": 7}}, "there are not 7 layers in the teacher's 'blocks', which has 6"),
        ({"blocks": {"layers": "blocks", "keep": [0, 1, 2, 6]}}, "there is no layer 6 in"),
        ({"blocks": {"layers": "layer", "every": 2}}, "0 of the 0 layers in the teacher's 'layer'"),
        ({"stem": "blocks.0"}, "'stem' .2 tensors. does not match the teacher's layer 'blocks.0' .7 tensors."),
    ],
)
def test_layers_that_do_not_fit_are_refused(sources: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started(4, **sources)


@pytest.mark.parametrize("choice", [{}, {"first": 1, "last": 1}, {"keep": []}, {"every": 0}], ids=str)
def test_choice_is_one(choice: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TeacherLayers(layers="blocks", **choice)
