"""Data and formulas that several tests of losses share."""

from math import exp

import numpy
import torch


def two_models(shape=(6, 5), seed=0):
    """Float64 outputs of a student and a teacher."""
    rng = numpy.random.default_rng(seed)
    return rng.normal(size=shape) * 2, rng.normal(size=shape) * 3


def two_models_torch(shape=(6, 5), seed=0):
    return tuple(torch.from_numpy(array) for array in two_models(shape, seed))


def softmax(numbers):
    powers = [exp(number - max(numbers)) for number in numbers]
    return [power / sum(powers) for power in powers]
