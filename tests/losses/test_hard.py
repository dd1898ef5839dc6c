from functools import partial
from math import exp, log

import numpy
import pytest
import torch

from kd_pipeline.errors import ConfigError, DataError
from kd_pipeline.losses import hard_label, task

SHAPES = [(1, 2), (1, 5), (4, 2), (6, 7)]


def cross_entropy_formula(student, weights, label_smoothing):
    total = 0.0
    for logits, row in zip(student, weights, strict=True):
        log_total = max(logits) + log(sum(exp(logit - max(logits)) for logit in logits))
        for logit, weight in zip(logits, row, strict=True):
            total -= ((1 - label_smoothing) * weight + label_smoothing / len(row)) * (logit - log_total)
    return total / len(student)


def one_hot(labels, num_classes):
    return numpy.eye(num_classes)[labels]


@pytest.fixture
def rng():
    return numpy.random.default_rng(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_task_with_class_indices(assert_matches, rng, shape, label_smoothing):
    labels = rng.integers(shape[1], size=shape[0])
    assert_matches(
        partial(task, labels=torch.tensor(labels), label_smoothing=label_smoothing),
        partial(cross_entropy_formula, weights=one_hot(labels, shape[1]), label_smoothing=label_smoothing),
        rng.normal(size=shape),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_task_with_soft_labels(assert_matches, rng, shape, label_smoothing):
    weights = rng.dirichlet(numpy.ones(shape[1]), size=shape[0])
    assert_matches(
        partial(task, labels=torch.tensor(weights), label_smoothing=label_smoothing),
        partial(cross_entropy_formula, weights=weights, label_smoothing=label_smoothing),
        rng.normal(size=shape),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_hard_label_formula(assert_matches, rng, shape, label_smoothing):
    teacher = rng.normal(size=shape)
    weights = one_hot(teacher.argmax(axis=1), shape[1])
    assert_matches(
        partial(hard_label, teacher_logits_NK=torch.tensor(teacher), label_smoothing=label_smoothing),
        partial(cross_entropy_formula, weights=weights, label_smoothing=label_smoothing),
        rng.normal(size=shape),
    )


def test_hard_label_ignores_confidence(rng):
    student, teacher = torch.tensor(rng.normal(size=(5, 4))), torch.tensor(rng.normal(size=(5, 4)))
    assert hard_label(student, teacher * 1000 - 7) == hard_label(student, teacher)
    assert hard_label(student, -teacher) != hard_label(student, teacher)


def test_half_precision_soft_labels(rng):
    student, weights = torch.tensor(rng.normal(size=(5, 4))).float(), torch.tensor(rng.dirichlet(numpy.ones(4), size=5))
    assert task(student, weights.half()) == task(student, weights.half().float())


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_label_out_of_range(label):
    """torch.nn.functional.cross_entropy ignores -100 by default."""
    with pytest.raises(
        DataError, match=f"label of row 1 is {label}, and the student has 3 logits, for labels from 0 to 2"
    ):
        task(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0, float("nan")])
def test_invalid_label_smoothing(label_smoothing):
    student, teacher, labels = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=f"below 1, got {label_smoothing}"):
        task(student, labels, label_smoothing=label_smoothing)
    with pytest.raises(ConfigError, match=f"below 1, got {label_smoothing}"):
        hard_label(student, teacher, label_smoothing=label_smoothing)
