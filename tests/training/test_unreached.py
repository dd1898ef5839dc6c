from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.training.unreached import unreached_parameters
from tests.training import networks

SHAPE = (3, 8, 8)
TEACHER = {"logits": TensorSpec((None, 10), torch.float32), "pooled": TensorSpec((None, 24), torch.float32)}
HEAD = ["3.weight", "3.bias"]
ON_FEATURES = {"loss": "cosine", "student": "2", "teacher": "pooled"}


def unreached(student: nn.Module, *, custom: Any = None, **settings: Any) -> list[str]:
    distillation = Distillation(
        DistillSettings(**settings),
        student=student,
        teacher_outputs=TEACHER,
        image_shape=SHAPE,
        num_classes=10,
        loss=custom,
    )
    return unreached_parameters(student, distillation, example={"images": torch.zeros(2, *SHAPE)})


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, []),
        ({"features": [ON_FEATURES]}, []),
        ({"loss": None, "task_weight": 1, "features": [ON_FEATURES]}, []),
        ({"loss": None, "features": [ON_FEATURES]}, HEAD),
        ({"task_weight": 0, "distill_weight": 0, "features": [ON_FEATURES]}, HEAD),
    ],
)
def test_head_is_reached_by_terms_on_logits(settings: dict[str, Any], wanted: list[str]) -> None:
    assert unreached(networks.plain(), **settings) == wanted


def test_loss_of_the_users_own_may_take_all() -> None:
    def loss(outputs: Tensor, batch: KDBatch) -> Tensor:
        return outputs.sum()

    assert unreached(networks.plain(), custom=loss, task_weight=0) == []


def test_student_is_left_as_it_was() -> None:
    student = networks.with_batchnorm()
    student[1].eval()
    student[0].requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert unreached(student) == []
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert [module.training for module in student] == [True, False, True, True, True]
    assert all(weight.grad is None for weight in student.parameters())


def test_frozen_student_has_none() -> None:
    assert unreached(networks.plain().requires_grad_(False)) == []
