"""A validation of your own: a function of the student and the loaders, and any of its numbers chooses the best.

Run it with `python examples/own_validation.py`.
"""

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from kd_pipeline import Arrays, Config, EvalTransform, KDDataLoader, TrainTransform, train
from kd_pipeline.models import small_resnet


def worst_digit(student: nn.Module, loaders: Mapping[str, KDDataLoader]) -> dict[str, float]:
    """The accuracy on the digit that is hardest for the student, and which one that is."""
    hits, counts = torch.zeros(10), torch.zeros(10)
    for batch in loaders["val"]:
        hits += torch.bincount(batch.labels[student(batch.images).argmax(dim=1) == batch.labels], minlength=10)
        counts += torch.bincount(batch.labels, minlength=10)
    return {"worst": (hits / counts).min(), "digit": (hits / counts).argmin(), "mean": hits.sum() / counts.sum()}


torch.manual_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
training, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
settings = {"epochs": 8, "optimizer": {"name": "adamw", "lr": 0.005}, "select_by": "val/worst", "select_mode": "max"}
config = Config(run_dir="runs/own_validation", stage="baseline", train=settings)
with KDDataLoader(training, crops, batch_size=64) as batches, KDDataLoader(val, whole, batch_size=64) as checks:
    data = {"train_batches": batches, "validation": checks}
    numbers = train(config, student=small_resnet(10, width=8), validate=worst_digit, **data).evaluations["val"].metrics
print(f"worst {numbers['worst']:.1%}, digit {numbers['digit']:.0f}, mean {numbers['mean']:.1%}")
