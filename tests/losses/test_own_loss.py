"""A loss of the user's own, by subclass or callable, on inputs of any shape: the same as written out."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_pipeline import losses
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.distillation import Distillation, DistillSettings, LossTerms
from kd_pipeline.models.modules import call_network

NUM_ROWS, LENGTH, NUM_CLASSES = 4, 6, 5


class Tagger(nn.Module):
    """Logits `[N, T, K]` for each position of a sequence of indices with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(ids) * mask[..., None]
        return {"logits": self.head(hidden), "hidden": hidden}


def inputs(num_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH, (num_rows, 1), generator=generator)
    return {"ids": torch.randint(20, (num_rows, LENGTH), generator=generator), "mask": mask}


def batch_of(**teacher: Tensor) -> KDBatch:
    return KDBatch(
        **inputs(NUM_ROWS),
        labels=torch.arange(NUM_ROWS),
        index=torch.arange(NUM_ROWS),
        valid=torch.ones(NUM_ROWS, dtype=torch.bool),
        teacher=teacher,
    )


def masked(outputs: Mapping[str, Tensor], batch: KDBatch) -> Tensor:
    """The cross-entropy with the teacher's softmax at the positions that the mask has."""
    wanted = batch.teacher["logits"].softmax(2)
    entropy = F.cross_entropy(outputs["logits"].flatten(0, 1), wanted.flatten(0, 1), reduction="none")
    return entropy[batch["mask"].flatten()].mean()


OUTPUTS = {"logits": TensorSpec((None, LENGTH, NUM_CLASSES), torch.float32)}
SETTINGS = DistillSettings.model_validate({"distill_weight": 2.0, "task_weight": 0.0})


def loss_of(distillation: Distillation, student: nn.Module, batch: KDBatch) -> LossTerms:
    with distillation.student_features(student) as features:
        outputs = call_network(student, batch.input)
    terms: LossTerms = distillation(outputs, features, batch, epoch=0, epochs=1)
    return terms


def test_logits_of_each_position_by_a_callable() -> None:
    student = Tagger()
    batch = batch_of(logits=torch.randn(NUM_ROWS, LENGTH, NUM_CLASSES))
    distillation = Distillation(
        SETTINGS, student=student, teacher_outputs=OUTPUTS, example=inputs(2), num_classes=None, loss=masked
    )
    terms = loss_of(distillation, student, batch)
    assert terms.total.equal(2 * masked(student(**batch.inputs), batch))
    assert terms.terms.keys() == {"distill"}


class Own(Distillation):
    def distill_loss(
        self, outputs: Any, features: Mapping[str, Tensor], batch: KDBatch, temperature: float | None
    ) -> Tensor:
        return masked(outputs, batch)


def test_subclass_with_another_term() -> None:
    student = Tagger()
    batch = batch_of(logits=torch.randn(NUM_ROWS, LENGTH, NUM_CLASSES))
    distillation = Own(SETTINGS, student=student, teacher_outputs=OUTPUTS, example=inputs(2), num_classes=None)
    assert loss_of(distillation, student, batch).total.equal(2 * masked(student(**batch.inputs), batch))


class Whole(Distillation):
    def forward(
        self, outputs: Any, features: Mapping[str, Tensor], batch: KDBatch, *, epoch: float, epochs: int
    ) -> LossTerms:
        value = outputs["hidden"].square().mean()
        return LossTerms(value, {"own": value}, {"own": 1.0}, None)


def test_subclass_with_its_own_forward() -> None:
    student = Tagger()
    settings = DistillSettings.model_validate({"loss": None, "student_losses": {"own": 1.0}})
    distillation = Whole(settings, student=student, teacher_outputs=None, example=inputs(2), num_classes=None)
    found = loss_of(distillation, student, batch_of())
    assert found.total.equal(student(**batch_of().inputs)["hidden"].square().mean())


def test_a_loss_of_ones_own_needs_no_teacher() -> None:
    student, batch = nn.Linear(3, NUM_CLASSES), batch_of().replace(inputs={"x": torch.randn(NUM_ROWS, 3)})
    batch = KDBatch(x=torch.randn(NUM_ROWS, 3), labels=batch.labels, index=batch.index, valid=batch.valid)
    distillation = Distillation(
        DistillSettings.model_validate({"distill_weight": 1.0, "task_weight": 0.5}),
        student=student,
        teacher_outputs=None,
        image_shape=(3,),
        num_classes=NUM_CLASSES,
        loss=lambda outputs, batch: outputs.square().mean(),
    )
    terms = loss_of(distillation, student, batch)
    logits = student(batch["x"])
    task = losses.task(logits, torch.arange(NUM_ROWS), valid=batch.valid)
    assert terms.total.equal(torch.stack([0.5 * task, logits.square().mean()]).sum())


def test_sequences_are_tokens() -> None:
    student = Tagger()
    settings = DistillSettings.model_validate(
        {
            "loss": None,
            "features": [{"loss": "feature_mse", "student": "hidden", "teacher": "deep", "projector": "linear"}],
        }
    )
    outputs = {"deep": TensorSpec((None, LENGTH, 16), torch.float32)}
    distillation = Distillation(settings, student=student, teacher_outputs=outputs, example=inputs(2), num_classes=None)
    batch = batch_of(deep=torch.randn(NUM_ROWS, LENGTH, 16))
    hidden = distillation.projectors[0](student(**batch.inputs)["hidden"])
    assert loss_of(distillation, student, batch).total.equal(losses.feature_mse(hidden, batch.teacher["deep"]))


def test_failing_example_is_shown() -> None:
    arguments: dict[str, Any] = {"student": Tagger(), "teacher_outputs": None, "num_classes": None}
    with pytest.raises(ConfigError, match=r"Tagger fails on a batch of two rows ids \[2, 6\], mask \[2, 2\]"):
        Distillation(DistillSettings(), example=inputs(2) | {"mask": torch.ones(2, 2)}, **arguments)
    with pytest.raises(TypeError, match="needs an example of the inputs, or image_shape"):
        Distillation(DistillSettings(), **arguments)
