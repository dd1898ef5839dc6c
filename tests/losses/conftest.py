"""Compares a loss with a reference formula in NumPy, in value and gradient."""

from collections.abc import Callable

import numpy
import pytest
import torch

STEP = 1e-6


def central_differences(formula: Callable[[numpy.ndarray], float], student: numpy.ndarray) -> numpy.ndarray:
    slopes = numpy.zeros_like(student)
    for position in numpy.ndindex(student.shape):
        step = numpy.zeros_like(student)
        step[position] = STEP
        slopes[position] = (formula(student + step) - formula(student - step)) / (2 * STEP)
    return slopes


@pytest.fixture
def assert_matches():
    """Compares a loss and a formula, both functions of the student, at float64 values of the student."""

    def check(loss, formula, student: numpy.ndarray) -> None:
        leaf = torch.tensor(student, requires_grad=True)
        value = loss(leaf)
        value.backward()
        numpy.testing.assert_allclose(value.item(), formula(student), rtol=1e-9, atol=1e-12)
        numpy.testing.assert_allclose(leaf.grad.numpy(), central_differences(formula, student), rtol=1e-5, atol=1e-8)

    return check
