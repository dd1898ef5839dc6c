"""Train a student by terms that learn from all ranks, as one of several ranks on gloo or alone."""

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.losses.distillation import Distillation, DistillSettings

TEACHER = {
    "pooled": TensorSpec((None, 12), torch.float32),
    "spatial": TensorSpec((None, 5, 12), torch.float32, num_prefix_tokens=1),
}
TERMS = (
    {"loss": "relational", "student": "pooled", "teacher": "pooled", "queue_size": 20, "standardize": "global"},
    {"loss": "am_radio", "student": "pooled", "teacher": "spatial", "standardize": "phi_s"},
)
SIZES = ((6, 6), (6, 6), (6, 6), (3, 2), (6, 6), (1, 1))
"""Rows of the two ranks in each step: the last of an epoch are fewer."""


class _Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"pooled": self.layer(images.mean((2, 3)))}


def train(sizes: list[tuple[slice, int]]) -> dict[str, Any]:
    """The weights, queue and statistics after one step of each global batch, of which this rank has a slice of rows."""
    torch.manual_seed(0)
    student = _Student()
    distillation = Distillation(
        DistillSettings(loss=None, features=TERMS),
        student=student,
        teacher_outputs=TEACHER,
        image_shape=(3, 4, 4),
        num_classes=None,
    )
    parameters = [*student.parameters(), *distillation.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step, (rows, num_rows) in enumerate(sizes):
        batch = _batch(step, num_rows, rows)
        optimizer.zero_grad()
        terms = distillation(student(batch.images), {}, batch, epoch=0, epochs=1)
        (terms.total * batch.valid.sum()).backward()
        num_valid = batch.valid.sum().float()
        if distributed.is_initialized():
            for tensor in (num_valid, *(parameter.grad for parameter in parameters)):
                distributed.all_reduce(tensor)
        for parameter in parameters:
            parameter.grad /= num_valid.clamp(min=1)
        optimizer.step()
    return {**student.state_dict(), **distillation.state_dict()}


def _batch(step: int, num_rows: int, rows: slice) -> KDBatch:
    generator = torch.Generator().manual_seed(step)
    valid = torch.arange(num_rows) % 5 != 3
    teacher = {name: torch.randn(num_rows, *spec.shape[1:], generator=generator) for name, spec in TEACHER.items()}
    for tensor in teacher.values():
        tensor[~valid] = float("nan")
    images = torch.randn(num_rows, 3, 4, 4, generator=generator)
    return KDBatch(
        images=images[rows],
        labels=None,
        index=torch.arange(num_rows)[rows],
        valid=valid[rows],
        teacher={name: tensor[rows] for name, tensor in teacher.items()},
    )


def train_rank(rank: int, folder: str) -> None:
    """One of two ranks; its state goes to a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    slices = [(slice(first, None) if rank else slice(0, first), first + second) for first, second in SIZES]
    torch.save(train(slices), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
