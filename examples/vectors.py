"""Vectors from a torch DataLoader: a wide perceptron learns digits, then its last two layers teach a narrow one.

Run it with `python examples/vectors.py`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_pipeline import Config, train
from kd_pipeline.models.features import with_features


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


torch.manual_seed(0)
digits, held_out = load_digits(), torch.arange(1797) % 5 == 0
vectors, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
data = {
    "train_batches": DataLoader(TensorDataset(vectors[~held_out], labels[~held_out]), batch_size=64, shuffle=True),
    "validation": DataLoader(TensorDataset(vectors[held_out], labels[held_out]), batch_size=64),
}
large, small = perceptron(128), perceptron(24)
settings = {"epochs": 10, "optimizer": {"name": "adamw", "lr": 0.01}}
train(Config(run_dir="runs/vectors", stage="baseline", train=settings), student=large, **data)

hidden = {"loss": "feature_mse", "student": "layer:-2", "teacher": "layer:-2"}  # through a projector from 24 to 128
config = Config(run_dir="runs/vectors", train=settings, distill={"features": [hidden]})
result = train(config, student=small, teacher=with_features(large, ["layer:-2"]), **data).evaluations["val"]
print(f"teacher {result.teacher.top1:.1%}, student {result.top1:.1%}, agreement {result.agreement:.1%}")
