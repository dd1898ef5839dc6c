"""A module with both networks and a forward of its own, which compares layers by index; `student` is what is kept.

Run it with `python examples/both_networks.py`.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_pipeline import Arrays, Config, EvalTransform, KDDataLoader, TrainTransform, losses, train
from kd_pipeline.models import small_resnet
from kd_pipeline.models.features import capture_features


class Pair(nn.Module):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher  # a submodule of this name is frozen, and in no checkpoint

    def forward(self, images: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        layers = ["layer:3", "layer:-4"]
        with capture_features(self.student, layers) as own, capture_features(self.teacher, layers) as wanted:
            logits, targets = self.student(images), self.teacher(images)
        attention = torch.stack([losses.attention_transfer(own[layer], wanted[layer]) for layer in layers]).sum()
        return {"logits": logits, "losses": {"soft": losses.soft_target(logits, targets), "attention": attention}}


torch.manual_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
training, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
pair = Pair(small_resnet(10, width=8), small_resnet(10, width=16))
shared = {"stage": "baseline", "train": {"epochs": 8, "optimizer": {"name": "adamw", "lr": 0.005}}}
with KDDataLoader(training, crops, batch_size=64) as batches, KDDataLoader(val, whole, batch_size=64) as checks:
    data = {"train_batches": batches, "validation": checks}
    train(Config(run_dir="runs/both/large", **shared), student=pair.teacher, **data)
    distill = {"loss": None, "student_losses": {"soft": 1.0, "attention": 100.0}}
    result = train(Config(run_dir="runs/both", distill=distill, **shared), student=pair, **data)
print(f"student {result.evaluations['val'].top1:.1%}")
