"""Sequences with padding, from a real EEG: networks get signal and mask by name. `python examples/sequences.py`"""

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

from kd_pipeline import BatchLoader, Config, KDBatch, losses, train

EEG = torch.from_numpy(np.fromfile(get_sample_data("eeg.dat", asfileobj=False)).reshape(800, 4)).float()
EEG /= EEG[600:].std(dim=0)  # of the part that is held out


class Forecaster(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(4, width, 8), nn.GELU(), nn.Conv1d(width, 4, 1))

    def forward(self, signal: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"next": self.layers(nn.functional.pad(signal.mT, (7, 0))).mT * mask[..., None]}


def windows(first: int, end: int) -> dict[str, Tensor]:
    starts, lengths, steps = torch.randint(first, end - 64, (32, 1)), torch.randint(24, 65, (32, 1)), torch.arange(64)
    mask = steps < lengths
    return {"signal": EEG[starts + steps] * mask[..., None], "mask": mask, "next": EEG[starts + steps + 1]}


def error(outputs: dict[str, Tensor], batch: KDBatch) -> Tensor:
    return losses.feature_mse(outputs["next"], (batch.teacher or batch.extra)["next"], mask=batch["mask"])


torch.manual_seed(0)
batches, checks = BatchLoader([windows(0, 600) for _ in range(64)], inputs=("signal", "mask")), windows(600, 800)
large, small = Forecaster(16), Forecaster(8)
for stage, network, teacher in ("baseline", large, None), ("distill", small, large):
    run = Config(run_dir="runs/eeg", stage=stage, train={"epochs": 6, "optimizer": {"name": "adamw", "lr": 0.01}})
    train(run, student=network, teacher=teacher, train_batches=batches, distillation=error)
    missed = losses.feature_mse(network(checks["signal"], checks["mask"])["next"], checks["next"], mask=checks["mask"])
    print(f"{stage} explains {1 - missed:.1%}")
