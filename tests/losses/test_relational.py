from functools import partial
from math import log, sqrt

import numpy
import pytest
import torch
from torch.nn import functional

from kd_pipeline.errors import ConfigError
from kd_pipeline.losses import relational
from tests.losses.reference import softmax, two_models, two_models_torch


def cosine_of(s, t):
    return sum(s * t) / sqrt(sum(s * s)) / sqrt(sum(t * t))


def formula(student, teacher, references, *, student_temperature, teacher_temperature, form):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q = softmax([cosine_of(s, r) / student_temperature for r in references])
        p = softmax([cosine_of(t, r) / teacher_temperature for r in references])
        total -= sum(a * log(b) for a, b in zip(p, q, strict=True))
        if form == "kl":
            total += sum(a * log(a) for a in p)
    return total / len(student)


def public_seed(student, teacher, queue, *, t=0.2, temp=1e-4):
    """SEED as in its authors' code: the own vector of the teacher, then the queue; soft cross-entropy."""
    s, t_own = functional.normalize(student, dim=1), functional.normalize(teacher, dim=1)
    queue = functional.normalize(queue, dim=1).T

    def logits(side):
        return torch.cat([(side * t_own).sum(1, keepdim=True), side @ queue], dim=1)

    labels = (logits(t_own) / temp).softmax(1)
    return -(labels * (logits(s) / t).log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("form", ["cross_entropy", "kl"])
@pytest.mark.parametrize("temperatures", [(0.2, 0.05), (1.0, 1.0)])
def test_formula(assert_matches, form, temperatures):
    student, teacher = two_models((4, 5))
    references = numpy.random.default_rng(1).normal(size=(6, 5))
    options = {"student_temperature": temperatures[0], "teacher_temperature": temperatures[1], "form": form}
    loss = partial(relational, teacher_ND=torch.tensor(teacher), references_MD=torch.tensor(references), **options)
    assert_matches(loss, partial(formula, teacher=teacher, references=references, **options), student)


def test_authors_code():
    """A sample for itself: the authors' references are its own vector and the queue."""
    student, teacher = two_models_torch((4, 5))
    queue = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row in range(4):
        own = slice(row, row + 1)
        expected = public_seed(student[own], teacher[own], queue)
        found = relational(student[own], teacher[own], references_MD=torch.cat([teacher[own], queue]))
        torch.testing.assert_close(found, expected)


def test_references_default_to_batch():
    student, teacher = two_models_torch((4, 5))
    valid = torch.tensor([True, False, True, True])
    expected = relational(student[valid], teacher[valid], references_MD=teacher[valid])
    teacher[1] = float("nan")
    torch.testing.assert_close(relational(student, teacher, valid=valid), expected)


def test_invalid_references_are_left_out():
    student, teacher = two_models_torch((4, 5))
    references = torch.cat([teacher, torch.full((2, 5), float("nan"))])
    valid = torch.tensor([True] * 4 + [False] * 2)
    student.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        found = relational(student, teacher, references_MD=references, references_valid=valid)
        found.backward()
    torch.testing.assert_close(found, relational(student, teacher))
    assert student.grad.isfinite().all()


def test_kl_of_equals_is_zero():
    _, teacher = two_models_torch()
    value = relational(teacher, teacher, student_temperature=0.1, teacher_temperature=0.1, form="kl")
    assert value.abs() < 1e-12


def test_scale_does_not_matter():
    student, teacher = two_models_torch()
    torch.testing.assert_close(relational(7 * student, 0.1 * teacher), relational(student, teacher))


def test_gradient_is_that_of_kl():
    student, teacher = two_models_torch()
    student.requires_grad_()
    gradients = [
        torch.autograd.grad(relational(student, teacher, teacher_temperature=0.1, form=form), student)[0]
        for form in ("cross_entropy", "kl")
    ]
    torch.testing.assert_close(*gradients)


ROWS = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references_MD": torch.ones(4, 5)}, r"floating \[M, 3\] .* got \[4, 5\] float32"),
        ({"references_MD": torch.ones(4, 3).long()}, r"got \[4, 3\] int64"),
        ({"references_MD": ROWS, "references_valid": torch.ones(3).bool()}, r"must be \[2\] bool, .* \[3\] bool"),
        ({"references_MD": ROWS, "references_valid": torch.ones(2)}, r"must be \[2\] bool, .* \[2\] float32"),
        ({"student_temperature": 0.0}, r"above 0, got 0"),
        ({"teacher_temperature": float("inf")}, r"above 0, got inf"),
        ({"form": "mse"}, r"'cross_entropy' or 'kl', got 'mse'"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        relational(ROWS, ROWS, **arguments)
