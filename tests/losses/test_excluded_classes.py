"""Classes that a model excludes with a logit of -inf, as ensembles, masks and overflowing half precision do."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from kd_pipeline import losses
from tests.losses.reference import kl_div, public_dkd, two_models_torch

INF = math.inf
LABELS = torch.tensor([0, 2, 4, 1, 0, 2])
LOSSES = {
    "kl": losses.soft_target,
    "cross_entropy": partial(losses.soft_target, form="cross_entropy"),
    "standardized": partial(losses.soft_target, standardize=True),
    "dkd": partial(losses.dkd, labels=LABELS),
    "dkd standardized": partial(losses.dkd, labels=LABELS, standardize=True),
    "dist": losses.dist,
    "hard_label": losses.hard_label,
}
"""Losses of the teacher's probabilities. All six rows allow class 0."""


def excluding_teacher(dtype=torch.float64):
    """Student and teacher; the teacher excludes class 3 everywhere, class 1 in the first row, and a target class."""
    student, teacher = two_models_torch()
    teacher[:, 3] = -INF
    teacher[0, 1] = -INF
    teacher[1, LABELS[1]] = -INF
    return student.to(dtype), teacher.to(dtype)


def value_and_gradient(loss, student):
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_equal(loss, reference, student):
    value, gradient = value_and_gradient(loss, student)
    expected_value, expected_gradient = value_and_gradient(reference, student)
    assert value.isfinite() and gradient.isfinite().all()
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_target_matches_torch(temperature):
    student, teacher = excluding_teacher()
    reference = partial(kl_div, teacher=teacher, temperature=temperature)
    assert_equal(partial(losses.soft_target, teacher_logits_NK=teacher, temperature=temperature), reference, student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cross_entropy_matches_torch(temperature):
    student, teacher = excluding_teacher()
    loss = partial(losses.soft_target, teacher_logits_NK=teacher, temperature=temperature, form="cross_entropy")

    def reference(leaf):
        p = (teacher / temperature).softmax(1)
        return temperature**2 * functional.cross_entropy(leaf / temperature, p)

    assert_equal(loss, reference, student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_matches_authors_code(temperature):
    student, teacher = excluding_teacher()
    loss = partial(losses.dkd, teacher_logits_NK=teacher, labels=LABELS, temperature=temperature)
    assert_equal(loss, partial(public_dkd, teacher=teacher, labels=LABELS, temperature=temperature), student)


@pytest.mark.parametrize("name", [name for name in LOSSES if "standardized" not in name])
def test_excluded_is_the_limit_of_unlikely(name):
    """Probabilities of 1e-100 are as good as 0; standardized logits have no such limit."""
    student, teacher = excluding_teacher()
    unlikely = teacher.nan_to_num(neginf=-1e3)
    assert_equal(
        lambda leaf: LOSSES[name](leaf, teacher_logits_NK=teacher),
        lambda leaf: LOSSES[name](leaf, teacher_logits_NK=unlikely),
        student,
    )


def test_standardizing_leaves_excluded_classes_out():
    student, teacher = excluding_teacher()
    rows = []
    for student_row, teacher_row in zip(student, teacher, strict=True):
        possible = teacher_row[teacher_row > -INF]
        p = ((possible - possible.mean()) / (possible.std() + 1e-7) / 2).softmax(0)
        q = ((student_row - student_row.mean()) / (student_row.std() + 1e-7) / 2).log_softmax(0)
        rows.append((p * (p.log() - q[teacher_row > -INF])).sum())
    value = losses.soft_target(student, teacher, temperature=2.0, standardize=True)
    torch.testing.assert_close(value, 4 * torch.stack(rows).mean())


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dist"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_class_that_both_exclude_does_not_exist(name, dtype):
    """`dist` is no such loss: the correlation counts all classes."""
    student, teacher = (model.to(dtype) for model in two_models_torch())
    column = torch.full((6, 1), -INF, dtype=dtype)
    value, gradient = value_and_gradient(
        lambda leaf: LOSSES[name](torch.cat([leaf, column], 1), torch.cat([teacher, column], 1)), student
    )
    expected_value, expected_gradient = value_and_gradient(lambda leaf: LOSSES[name](leaf, teacher), student)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_student_may_exclude_what_the_teacher_excludes(name):
    student, teacher = two_models_torch()
    student[:, 3] = teacher[:, 3] = -INF
    value, gradient = value_and_gradient(lambda leaf: LOSSES[name](leaf, teacher), student)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[:, 3] == 0).all()


@pytest.mark.parametrize("name", ["kl", "cross_entropy", "dkd"])
def test_student_must_not_exclude_what_the_teacher_allows(name):
    """The divergence is infinite then, as in torch; the gradient is finite."""
    student, teacher = two_models_torch()
    student[1, 3] = -INF
    value, gradient = value_and_gradient(lambda leaf: LOSSES[name](leaf, teacher), student)
    assert value == INF and gradient.isfinite().all()


def test_dkd_of_a_certain_teacher():
    """It has no distribution over the other classes, which nothing is to be learned from."""
    student, teacher = two_models_torch((1, 4))
    label = torch.tensor([2])
    teacher[:, [0, 1, 3]] = -INF
    value, gradient = value_and_gradient(lambda leaf: losses.dkd(leaf, teacher, label), student)
    tckd, tckd_gradient = value_and_gradient(lambda leaf: losses.dkd(leaf, teacher, label, beta=0.0), student)
    assert value == tckd and value.isfinite() and gradient.equal(tckd_gradient)
    same, gradient = value_and_gradient(lambda leaf: losses.dkd(leaf, teacher, label), teacher)
    assert same == 0 and (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("row", [[-INF] * 5, [1.0, INF, 0.0, 2.0, -1.0], [1.0, math.nan, 0.0, 2.0, -1.0]])
def test_row_without_a_distribution_is_not_hidden(name, row):
    student, teacher = two_models_torch()
    teacher[4] = torch.tensor(row)
    assert LOSSES[name](student, teacher).isnan()
    valid = torch.arange(6) != 4
    value, gradient = value_and_gradient(lambda leaf: LOSSES[name](leaf, teacher, valid=valid), student)
    assert value.isfinite() and gradient.isfinite().all()


def test_distance_to_an_excluded_class_is_infinite():
    student, teacher = excluding_teacher()
    assert losses.logit_mse(student, teacher) == INF
    assert losses.cosine(student, teacher).isnan()


def test_task_with_soft_labels_of_zero():
    """Mixup's labels are 0 for most classes; the student may exclude those."""
    student, _ = two_models_torch()
    student[:, 3] = -INF
    weights = 0.7 * functional.one_hot(LABELS, 5) + 0.3 * functional.one_hot(LABELS.roll(1), 5).double()
    value, gradient = value_and_gradient(lambda leaf: losses.task(leaf, weights), student)
    possible = [0, 1, 2, 4]
    expected = nn.CrossEntropyLoss()(student[:, possible], weights[:, possible])
    torch.testing.assert_close(value, expected)
    assert gradient.isfinite().all() and (gradient[:, 3] == 0).all()
