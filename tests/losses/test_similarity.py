from functools import partial
from math import sqrt

import pytest
import torch

from kd_pipeline.losses import cosine, dist, logit_mse
from tests.losses.reference import softmax, two_models, two_models_torch

SHAPES = [(1, 2), (1, 5), (2, 2), (4, 3), (6, 8)]


def squared_distance_formula(student, teacher):
    rows = zip(student, teacher, strict=True)
    return sum(sum((s - t) ** 2 for s, t in zip(*row, strict=True)) / len(row[0]) for row in rows) / len(student)


def cosine_formula(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += 1 - sum(s * t) / sqrt(sum(s * s)) / sqrt(sum(t * t))
    return total / len(student)


def correlation(xs, ys):
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    spread = sqrt(sum((x - x_mean) ** 2 for x in xs)) * sqrt(sum((y - y_mean) ** 2 for y in ys))
    return covariance / (spread + 1e-8)


def dist_formula(student, teacher, temperature, inter_weight, intra_weight):
    student = [softmax([logit / temperature for logit in row]) for row in student]
    teacher = [softmax([logit / temperature for logit in row]) for row in teacher]
    num_rows, num_classes = len(student), len(student[0])
    inter = sum(1 - correlation(student[i], teacher[i]) for i in range(num_rows)) / num_rows
    intra = 0.0
    if num_rows >= 2:
        for k in range(num_classes):
            intra += (1 - correlation([row[k] for row in student], [row[k] for row in teacher])) / num_classes
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1)])
def test_logit_mse_formula(assert_matches, shape):
    student, teacher = two_models(shape)
    loss = partial(logit_mse, teacher_logits_NK=torch.tensor(teacher))
    assert_matches(loss, partial(squared_distance_formula, teacher=teacher), student)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1)])
def test_cosine_formula(assert_matches, shape):
    student, teacher = two_models(shape)
    assert_matches(partial(cosine, teacher_ND=torch.tensor(teacher)), partial(cosine_formula, teacher=teacher), student)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("inter_weight", "intra_weight"), [(1.0, 1.0), (2.0, 0.0), (0.0, 0.5)])
def test_dist_formula(assert_matches, shape, temperature, inter_weight, intra_weight):
    student, teacher = two_models(shape)
    settings = {"temperature": temperature, "inter_weight": inter_weight, "intra_weight": intra_weight}
    loss = partial(dist, teacher_logits_NK=torch.tensor(teacher), **settings)
    assert_matches(loss, partial(dist_formula, teacher=teacher, **settings), student)


def test_logit_mse_compares_logits():
    """Shifting every logit by 3 changes no softmax, but adds 9 to the squared distance."""
    student, _ = two_models_torch()
    torch.testing.assert_close(logit_mse(student + 3, student), torch.tensor(9.0, dtype=torch.float64))


def test_logit_mse_is_quadratic():
    student, teacher = two_models_torch()
    torch.testing.assert_close(logit_mse(5 * student, 5 * teacher), 25 * logit_mse(student, teacher))


def test_cosine_ignores_norm():
    student, teacher = two_models_torch()
    length = torch.logspace(-6, 6, len(student), dtype=torch.float64)[:, None]
    torch.testing.assert_close(cosine(student * length, teacher), cosine(student, teacher))
    torch.testing.assert_close(cosine(student, teacher * length), cosine(student, teacher))


def test_cosine_range():
    rows = torch.eye(3)
    assert cosine(rows, 7 * rows) == 0
    assert cosine(rows, rows.roll(1, 0)) == 1
    assert cosine(rows, -7 * rows) == 2


def test_cosine_of_zero_row():
    student = torch.zeros(4, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 3.0, 4.0]]).expand(4, 3)
    value = cosine(student, teacher)
    value.backward()
    assert value == 1
    torch.testing.assert_close(student.grad.norm(dim=1), torch.full((4,), 0.25))
    assert cosine(teacher, torch.zeros(4, 3)) == 1
    assert cosine(torch.zeros(4, 3), torch.zeros(4, 3)) == 1


def test_dist_scales_with_squared_temperature():
    student, teacher = two_models_torch()
    for weights in ({"inter_weight": 0.0}, {"intra_weight": 0.0}):
        scaled = dist(3 * student, 3 * teacher, temperature=3.0, **weights)
        torch.testing.assert_close(scaled, 9 * dist(student, teacher, temperature=1.0, **weights))


def test_dist_defaults():
    student, teacher = two_models_torch()
    assert dist(student, teacher) == dist(student, teacher, temperature=1.0, inter_weight=1.0, intra_weight=1.0)


def test_dist_of_equal_logits():
    student, _ = two_models_torch()
    assert dist(student, student).abs() < 1e-6


def test_dist_is_invariant_to_uniform_mixing():
    """The same affine map of all rows and columns does not change correlations."""
    student, teacher = two_models_torch()
    mixed = (0.3 * teacher.softmax(1) + 0.7 / 5).log()
    torch.testing.assert_close(dist(student, mixed), dist(student, teacher), rtol=1e-6, atol=0)
    torch.testing.assert_close(dist(mixed, student), dist(teacher, student), rtol=1e-6, atol=0)


def test_inter_is_invariant_to_mixing_per_row():
    student, teacher = two_models_torch()
    share = torch.linspace(0.2, 0.9, len(teacher), dtype=torch.float64)[:, None]
    mixed = (share * teacher.softmax(1) + (1 - share) / 5).log()
    inter, intra = {"intra_weight": 0.0}, {"inter_weight": 0.0}
    torch.testing.assert_close(dist(student, mixed, **inter), dist(student, teacher, **inter), rtol=1e-6, atol=0)
    assert abs(dist(student, mixed, **intra) - dist(student, teacher, **intra)) > 1e-3


def test_dist_is_invariant_to_shift():
    student, teacher = two_models_torch()
    torch.testing.assert_close(dist(student + 40, teacher - 40), dist(student, teacher))


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False]])
def test_intra_needs_two_valid_rows(valid):
    student, teacher = two_models_torch((3, 4))
    student.requires_grad_()
    value = dist(student, teacher, inter_weight=0.0, valid=torch.tensor(valid))
    (gradient,) = torch.autograd.grad(value, student)
    assert value == 0
    assert (gradient == 0).all()


def test_intra_ignores_invalid_rows():
    student, teacher = two_models_torch((5, 4))
    valid = torch.tensor([True, False, True, True, False])
    teacher[~valid] = 100 * torch.rand(2, 4, dtype=torch.float64)
    expected = dist(student[valid], teacher[valid], inter_weight=0.0)
    torch.testing.assert_close(dist(student, teacher, inter_weight=0.0, valid=valid), expected)


def test_dist_of_constant_student():
    _, teacher = two_models_torch()
    student = torch.zeros_like(teacher, requires_grad=True)
    value = dist(student, teacher)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(2.0, dtype=torch.float64))
    assert student.grad.isfinite().all()
