from functools import partial
from math import log, sqrt

import numpy
import pytest
import torch

from kd_pipeline.losses import dkd, soft_target
from tests.losses.reference import softmax, two_models, two_models_torch

SHAPES = [(1, 2), (1, 5), (2, 2), (3, 4), (5, 9)]


def standardized(row):
    mean = sum(row) / len(row)
    deviation = sqrt(sum((logit - mean) ** 2 for logit in row) / (len(row) - 1))
    return [(logit - mean) / (deviation + 1e-7) for logit in row]


def divergence(teacher, student):
    return sum(p * (log(p) - log(q)) for p, q in zip(teacher, student, strict=True))


def softened(logits, temperature, standardize):
    rows = [standardized(row) if standardize else row for row in logits]
    return [softmax([logit / temperature for logit in row]) for row in rows]


def soft_target_formula(student, teacher, temperature, standardize):
    rows = zip(softened(teacher, temperature, standardize), softened(student, temperature, standardize), strict=True)
    return temperature**2 * sum(divergence(p, q) for p, q in rows) / len(student)


def cross_entropy_formula(student, teacher, temperature):
    rows = zip(softened(teacher, temperature, False), softened(student, temperature, False), strict=True)
    entropies = [-sum(p_k * log(q_k) for p_k, q_k in zip(p, q, strict=True)) for p, q in rows]
    return temperature**2 * sum(entropies) / len(student)


def dkd_formula(student, teacher, labels, alpha, beta, temperature, standardize):
    total = 0.0
    rows = zip(softened(teacher, temperature, standardize), softened(student, temperature, standardize), strict=True)
    for (p, q), label in zip(rows, labels, strict=True):
        others = [k for k in range(len(p)) if k != label]
        p_rest, q_rest = sum(p[k] for k in others), sum(q[k] for k in others)
        target = divergence([p[label], p_rest], [q[label], q_rest])
        non_target = divergence([p[k] / p_rest for k in others], [q[k] / q_rest for k in others])
        total += alpha * target + beta * non_target
    return temperature**2 * total / len(student)


def two_models_and_labels(shape=(6, 5)):
    return *two_models(shape), numpy.random.default_rng(0).integers(shape[1], size=shape[0])


def two_models_and_labels_torch(shape=(6, 5)):
    return tuple(torch.from_numpy(array) for array in two_models_and_labels(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_soft_target_formula(assert_matches, shape, temperature, standardize):
    student, teacher = two_models(shape)
    loss = partial(
        soft_target, teacher_logits_NK=torch.tensor(teacher), temperature=temperature, standardize=standardize
    )
    formula = partial(soft_target_formula, teacher=teacher, temperature=temperature, standardize=standardize)
    assert_matches(loss, formula, student)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_cross_entropy_formula(assert_matches, shape, temperature):
    student, teacher = two_models(shape)
    loss = partial(soft_target, teacher_logits_NK=torch.tensor(teacher), temperature=temperature, form="cross_entropy")
    assert_matches(loss, partial(cross_entropy_formula, teacher=teacher, temperature=temperature), student)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_dkd_formula(assert_matches, shape, temperature, standardize):
    student, teacher, labels = two_models_and_labels(shape)
    settings = {"alpha": 0.7, "beta": 2.5, "temperature": temperature, "standardize": standardize}
    loss = partial(dkd, teacher_logits_NK=torch.tensor(teacher), labels=torch.tensor(labels), **settings)
    assert_matches(loss, partial(dkd_formula, teacher=teacher, labels=labels, **settings), student)


def test_forms_have_equal_gradients():
    student, teacher = two_models_torch()
    student.requires_grad_()
    (of_kl,) = torch.autograd.grad(soft_target(student, teacher, form="kl"), student)
    (of_cross_entropy,) = torch.autograd.grad(soft_target(student, teacher, form="cross_entropy"), student)
    torch.testing.assert_close(of_kl, of_cross_entropy)


def test_defaults():
    student, teacher, labels = two_models_and_labels_torch()
    assert soft_target(student, teacher) == soft_target(student, teacher, temperature=4.0)
    assert dkd(student, teacher, labels) == dkd(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0)


@pytest.mark.parametrize("temperature", [0.25, 3.0, 20.0])
@pytest.mark.parametrize(
    "loss",
    [
        lambda student, teacher, labels, temperature: soft_target(student, teacher, temperature=temperature),
        lambda student, teacher, labels, temperature: soft_target(
            student, teacher, temperature=temperature, form="cross_entropy"
        ),
        lambda student, teacher, labels, temperature: dkd(student, teacher, labels, temperature=temperature, alpha=0),
        lambda student, teacher, labels, temperature: dkd(student, teacher, labels, temperature=temperature, beta=0),
    ],
    ids=["kl", "cross_entropy", "dkd without TCKD", "dkd without NCKD"],
)
def test_loss_scales_with_squared_temperature(loss, temperature):
    """Logits times T at temperature T are the logits at temperature 1, except for the factor."""
    student, teacher, labels = two_models_and_labels_torch()
    scaled = loss(temperature * student, temperature * teacher, labels, temperature)
    torch.testing.assert_close(scaled, temperature**2 * loss(student, teacher, labels, 1.0))


def test_standardized_scales_with_squared_temperature():
    student, teacher = two_models_torch()
    standardized_logits = [
        torch.tensor([standardized(row) for row in side.tolist()], dtype=torch.float64) for side in (student, teacher)
    ]
    expected = 9 * soft_target(standardized_logits[0] / 3, standardized_logits[1] / 3, temperature=1.0)
    torch.testing.assert_close(soft_target(student, teacher, temperature=3.0, standardize=True), expected)


def test_high_temperature_limit():
    """Half the mean squared error of centered logits (Hinton et al., equation 4); it would be 0 without T²."""
    student, teacher = two_models_torch()
    centered = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(
        soft_target(student, teacher, temperature=1e4), centered.square().mean() / 2, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
def test_impossible_classes_do_not_matter(form):
    """A mean over N x K would be half as large with twice the classes."""
    student, teacher, labels = two_models_and_labels_torch()
    impossible = torch.full_like(student, -1e5)
    wider = torch.cat([student, impossible], 1), torch.cat([teacher, impossible], 1)
    torch.testing.assert_close(soft_target(*wider, form=form), soft_target(student, teacher, form=form))
    torch.testing.assert_close(dkd(*wider, labels), dkd(student, teacher, labels))


@pytest.mark.parametrize("standardize", [False, True])
def test_zero_only_for_equal_logits(standardize):
    student, teacher, labels = two_models_and_labels_torch()
    assert soft_target(teacher, teacher, standardize=standardize) == 0
    assert dkd(teacher, teacher, labels, standardize=standardize) == 0
    assert soft_target(student, teacher, standardize=standardize) > 0.01
    assert dkd(student, teacher, labels, standardize=standardize) > 0.01


@pytest.mark.parametrize("standardize", [False, True])
def test_shift_invariance(standardize):
    student, teacher, labels = two_models_and_labels_torch()
    shift = torch.linspace(-50, 50, len(student), dtype=torch.float64)[:, None]
    for loss in (
        partial(soft_target, standardize=standardize),
        partial(dkd, labels=labels, standardize=standardize),
    ):
        expected = loss(student, teacher)
        torch.testing.assert_close(loss(student + shift, teacher), expected)
        torch.testing.assert_close(loss(student, teacher + shift), expected)


def test_standardize_ignores_scale():
    student, teacher, labels = two_models_and_labels_torch()
    scale = torch.linspace(0.5, 8, len(student), dtype=torch.float64)[:, None]
    for loss in (soft_target, partial(dkd, labels=labels)):
        expected = loss(student, teacher, standardize=True)
        close = {"rtol": 1e-5, "atol": 0}  # the epsilon of 1e-7 does not scale
        torch.testing.assert_close(loss(student * scale, teacher, standardize=True), expected, **close)
        torch.testing.assert_close(loss(student, teacher * scale, standardize=True), expected, **close)
        assert abs(loss(student * scale, teacher) / loss(student, teacher) - 1) > 0.05


def test_dkd_generalizes_soft_target():
    """The decomposition in the paper: KL = TCKD + (1 - p_target) NCKD."""
    student, teacher, labels = two_models_and_labels_torch((1, 6))
    non_target_probability = 1 - (teacher / 2).softmax(1)[0, labels[0]].item()
    torch.testing.assert_close(
        dkd(student, teacher, labels, alpha=1.0, beta=non_target_probability, temperature=2.0),
        soft_target(student, teacher, temperature=2.0),
    )


def test_nckd_excludes_target_class():
    student, teacher, labels = two_models_and_labels_torch((4, 5))
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(dkd(student, teacher, labels, alpha=0.0, beta=1.0), student)
    assert (gradient.gather(1, labels[:, None]) == 0).all()
    assert (gradient != 0).sum() == gradient.numel() - len(labels)


def test_nckd_of_two_classes():
    student, teacher, labels = two_models_and_labels_torch((5, 2))
    student.requires_grad_()
    value = dkd(student, teacher, labels, alpha=0.0, beta=8.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert value == 0
    assert (gradient == 0).all()


def test_dkd_with_soft_labels():
    student, teacher, labels = two_models_and_labels_torch()
    weights = 0.6 * torch.nn.functional.one_hot(labels, 5) + 0.4 * torch.nn.functional.one_hot((labels + 1) % 5, 5)
    assert dkd(student, teacher, weights) == dkd(student, teacher, labels)
    assert dkd(student, teacher, (labels + 1) % 5) != dkd(student, teacher, labels)


def test_nckd_with_large_target_logit():
    """Subtracting 1000 from the target's logit, as public code does, would not suffice here."""
    student = torch.tensor([[50000.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[60000.0, 2.0, 1.0]])
    value = dkd(student, teacher, torch.tensor([0]), alpha=0.0, beta=1.0, temperature=1.0)
    others = soft_target(student[:, 1:].detach(), teacher[:, 1:], temperature=1.0)
    torch.testing.assert_close(value, others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype):
    """log(softmax(.)) is log(0) here."""
    student = torch.tensor([[-300.0, 300.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype)
    value = soft_target(student, teacher, temperature=1.0)
    decoupled = dkd(student, teacher, torch.tensor([0]), alpha=1.0, beta=1.0, temperature=1.0)
    assert value == 600
    assert decoupled == 600 + 300
    for loss in (value, decoupled):
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.isfinite().all()
