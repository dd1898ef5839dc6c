"""Evaluate a student without a head: the distillation loss on a split, and how close its features are."""

from dataclasses import replace
from itertools import islice

import torch
import torch.distributed
from torch import Tensor, nn

from kd_pipeline._core.progress import Report, no_report
from kd_pipeline.errors import DataError
from kd_pipeline.evaluation._evaluate import Evaluation, eval_mode, images_for
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.teachers.base import Teacher

__all__ = ["evaluate_features"]


@torch.no_grad()
def evaluate_features(
    student: nn.Module,
    distillation: Distillation,
    loader: KDDataLoader,
    teacher: Teacher,
    *,
    epoch: float,
    epochs: int,
    max_batches: int | None = None,
    report: Report = no_report,
) -> Evaluation:
    """The loss and each of its terms on one epoch of `loader`, as means over its valid rows.

    Args:
        student: the network, which is in eval mode meanwhile.
        distillation: the loss, with the projectors that were trained with the student.
        loader: the split, without a teacher.
        teacher: whose features are compared.
        epoch: epochs done so far, for ramps.
        epochs: length of the run.
        max_batches: stop after this many batches.
        report: called with the number of batches that are done, and that there are.

    Raises:
        DataError: no sample can be read.
    """
    num_batches = min(len(loader), max_batches or len(loader))
    sums: dict[str, Tensor] = {}
    with eval_mode(student), eval_mode(distillation):
        for number, batch in enumerate(islice(loader, max_batches)):
            report(number, num_batches)
            batch = replace(batch, teacher=teacher(batch.images))
            with distillation.student_features(student) as features:
                outputs = student(images_for(student, batch.images))
            found = distillation(outputs, features, batch, epoch=epoch, epochs=epochs)
            num_valid = batch.valid.sum().double()
            for name, value in {"samples": torch.ones_like(num_valid), "loss": found.total, **found.terms}.items():
                sums[name] = sums.get(name, 0) + value.double() * num_valid
    if loader.shard.world_size > 1:
        for total in sums.values():
            torch.distributed.all_reduce(total)
    num_samples = int(sums.pop("samples"))
    if num_samples == 0:
        raise DataError("no sample of this split can be read, so there is nothing to evaluate")
    means = {name: float(total) / num_samples for name, total in sums.items()}
    return Evaluation(
        num_samples=num_samples,
        num_bad_rows=0,
        top1=None,
        top5=None,
        macro_f1=None,
        loss=means.pop("loss"),
        agreement=None,
        kl=None,
        class_accuracy=None,
        confusion=None,
        classes=None,
        metrics=means,
    )
