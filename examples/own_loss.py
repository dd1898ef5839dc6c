"""A loss of your own in `train`: a function of what the student returns and of the batch.

Run it with `python examples/own_loss.py`.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from kd_pipeline import Arrays, Config, EvalTransform, KDBatch, KDDataLoader, TrainTransform, losses, train
from kd_pipeline.models import small_resnet


def jensen_shannon(logits: Tensor, batch: KDBatch) -> Tensor:
    """How far two softmaxes are from their mean, plus a little of the cross-entropy with the labels."""
    own, wanted = logits.softmax(dim=1), batch.teacher["logits"].softmax(dim=1)
    mean = (own + wanted) / 2
    distances = (own * (own / mean).log() + wanted * (wanted / mean).log()).sum(dim=1)
    return distances[batch.valid].mean() + 0.1 * losses.task(logits, batch.labels, valid=batch.valid)


torch.manual_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
training, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
large, small = small_resnet(10, width=16), small_resnet(10, width=8)
settings = {"epochs": 6, "optimizer": {"name": "adamw", "lr": 0.005}}
with KDDataLoader(training, crops, batch_size=64) as batches, KDDataLoader(val, whole, batch_size=64) as checks:
    data = {"train_batches": batches, "validation": checks}
    train(Config(run_dir="runs/own_loss", stage="baseline", train=settings), student=large, **data)
    config = Config(run_dir="runs/own_loss", train=settings)
    result = train(config, student=small, teacher=large, distillation=jensen_shannon, **data).evaluations["val"]
print(f"student {result.top1:.1%}, agreement {result.agreement:.1%}")
