"""A student that returns losses of its own by name; each joins the training loss with its weight from the config.

Run it with `python examples/student_losses.py`.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kd_pipeline import Config, train


class Autoencoder(nn.Module):
    """Classifies from a code that also has to draw the image again, and to be sparse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.decoder, self.head = nn.Linear(width, 64), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        code = self.encoder(pixels)
        losses = {"reconstruction": (self.decoder(code) - pixels).square().mean(), "sparsity": code.abs().mean()}
        return {"logits": self.head(code), "losses": losses}


torch.manual_seed(0)
digits, held_out = load_digits(), torch.arange(1797) % 5 == 0
vectors, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
data = {
    "train_batches": DataLoader(TensorDataset(vectors[~held_out], labels[~held_out]), batch_size=64, shuffle=True),
    "validation": DataLoader(TensorDataset(vectors[held_out], labels[held_out]), batch_size=64),
}
large, small = Autoencoder(256), Autoencoder(24)
settings = {"epochs": 8, "optimizer": {"name": "adamw", "lr": 0.01}}
shared = {"train": settings, "distill": {"student_losses": {"reconstruction": 1.0, "sparsity": 0.01}}}
train(Config(run_dir="runs/student_losses", stage="baseline", **shared), student=large, **data)
result = train(Config(run_dir="runs/student_losses", **shared), student=small, teacher=large, **data)
print(f"student {result.evaluations['val'].top1:.1%}")
