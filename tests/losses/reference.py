"""Data and formulas that several tests of losses share."""

from math import exp

import numpy
import torch
from torch import Tensor
from torch.nn import functional


def two_models(shape=(6, 5), seed=0):
    """Float64 outputs of a student and a teacher."""
    rng = numpy.random.default_rng(seed)
    return rng.normal(size=shape) * 2, rng.normal(size=shape) * 3


def two_models_torch(shape=(6, 5), seed=0):
    return tuple(torch.from_numpy(array) for array in two_models(shape, seed))


def softmax(numbers):
    powers = [exp(number - max(numbers)) for number in numbers]
    return [power / sum(powers) for power in powers]


def kl_div(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft targets as public code writes them."""
    q, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * functional.kl_div(q, p, reduction="batchmean")


def public_dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 4.0, beta: float = 8.0
) -> Tensor:
    """DKD as in its authors' code, mdistiller."""
    is_target = functional.one_hot(labels, student.shape[1]).bool()

    def binary(logits: Tensor) -> Tensor:
        p = (logits / temperature).softmax(1)
        return torch.stack([(p * is_target).sum(1), (p * ~is_target).sum(1)], 1)

    tckd = functional.kl_div(binary(student).log(), binary(teacher), reduction="batchmean")
    others = [logits / temperature - 1000 * is_target for logits in (student, teacher)]
    nckd = functional.kl_div(others[0].log_softmax(1), others[1].softmax(1), reduction="batchmean")
    return temperature**2 * (tckd + beta * nckd)


def public_dist(student: Tensor, teacher: Tensor) -> Tensor:
    """DIST as in its authors' code: beta = gamma = tau = 1."""

    def distance(rows: Tensor, others: Tensor) -> Tensor:
        rows, others = (each - each.mean(1, keepdim=True) for each in (rows, others))
        return 1 - ((rows * others).sum(1) / (rows.norm(dim=1) * others.norm(dim=1) + 1e-8)).mean()

    student, teacher = student.softmax(1), teacher.softmax(1)
    return distance(student, teacher) + distance(student.T, teacher.T)
