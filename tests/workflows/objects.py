"""Networks and batches of a user, and the plain loop that `train` has to equal."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.workflows._train import TrainResult, train
from tests.training.networks import plain

EPOCHS, LR, ROWS = 2, 0.05, 16


def network(seed: int = 0, width: int = 8) -> nn.Module:
    """For images of 8x8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return plain(width=width)


def tensors(num_rows: int = 96, start: int = 0) -> tuple[Tensor, Tensor]:
    """Images `[N, 3, 8, 8]` and labels of the digits."""
    digits = load_digits()
    chosen = slice(start, start + num_rows)
    images = torch.from_numpy(digits.images[chosen]).float().div(16)[:, None].expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(digits.target[chosen]).long()


def batches(num_rows: int = 96, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """A plain list of tuples."""
    images, labels = tensors(num_rows, start)
    return list(zip(images.split(ROWS), labels.split(ROWS), strict=True))


def shuffled(num_rows: int = 96, **options: Any) -> "DataLoader[Any]":
    """A torch loader with a generator of its own."""
    generator = torch.Generator().manual_seed(7)
    return DataLoader(TensorDataset(*tensors(num_rows)), batch_size=ROWS, shuffle=True, generator=generator, **options)


def teacher() -> Teacher:
    """In PyTorch and float32, whatever is faster here."""
    settings = TeacherSettings(backend="pytorch", precision="fp32")
    return open_teacher(settings, module=network(5), image_shape=(3, 8, 8))


class Stopped(Exception):
    """What ends a run, as a crash does."""


class StopBefore(Callback):
    """Fails before a step, counted from 0."""

    def __init__(self, step: int, error: Exception | None = None) -> None:
        self._step, self._error = step, error or Stopped()

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step == self._step:
            raise self._error


def config(folder: Path, **changes: Any) -> Config:
    """Of a run of two epochs without data; `changes` are of `train`."""
    settings: dict[str, Any] = {
        "epochs": EPOCHS,
        "optimizer": {"name": "sgd", "lr": LR},
        "schedule": {"kind": "constant"},
        "channels_last": False,
        "log_every_steps": 1,
        "loggers": ("csv",),
        "export": {"onnx": False},
    }
    return Config(run_dir=folder, train=TrainSettings.model_validate(settings | changes))


def run(folder: Path, changes: Mapping[str, Any] | None = None, **objects: Any) -> TrainResult:
    """A run with a student, a teacher and a list of batches, unless `objects` has others."""
    given: dict[str, Any] = {"student": network(), "teacher": teacher(), "train_batches": batches()}
    return train(config(folder, **(changes or {})), **(given | objects))


def distillation_of(student: nn.Module, of_teacher: Teacher | None, **settings: Any) -> Distillation:
    """The loss of the config with these settings."""
    return Distillation(
        DistillSettings.model_validate(settings),
        student=student,
        teacher_outputs=None if of_teacher is None else of_teacher.outputs,
        image_shape=(3, 8, 8),
        num_classes=10,
    )


def plain_loop(
    epochs_of_batches: Callable[[], Iterable[Any]],
    *,
    student: nn.Module | None = None,
    loss: Callable[[Any, KDBatch], Tensor] | None = None,
    with_teacher: bool = True,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    epochs: int = EPOCHS,
) -> nn.Module:
    """A training loop of torch alone but for the default loss; returns the student."""
    student = network() if student is None else student
    of_teacher = network(5).eval()
    distillation = distillation_of(student, teacher() if with_teacher else None) if loss is None else None
    own = torch.optim.SGD(student.parameters(), lr=LR) if optimizer is None else optimizer(student)
    schedule = None if scheduler is None else scheduler(own)
    student.train()
    for epoch in range(epochs):
        for images, labels in epochs_of_batches():
            with torch.no_grad():
                outputs = {"logits": of_teacher(images)} if with_teacher else {}
            batch = KDBatch(
                images=images,
                labels=labels,
                index=torch.arange(len(images)),
                valid=torch.ones(len(images), dtype=torch.bool),
                teacher=outputs,
            )
            found = student(images)
            if loss is not None:
                value = loss(found, batch)
            else:
                assert distillation is not None
                value = distillation(found, {}, batch, epoch=epoch, epochs=epochs).total
            own.zero_grad()
            value.backward()
            own.step()
            if schedule is not None:
                schedule.step()
    return student


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Bitwise the same weights."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name].cpu(), theirs[name].cpu())]
