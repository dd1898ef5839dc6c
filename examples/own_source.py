"""A source of your own: windows of the photographs that scikit-learn ships, of which only the corners are kept.

Run it with `python examples/own_source.py`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from kd_pipeline import BaseSource, Config, EvalTransform, KDDataLoader, TrainTransform, train
from kd_pipeline.models import small_resnet


class Windows(BaseSource):
    """48 x 48 pixels at each of some columns; the loader decodes, augments and plans them as any other source."""

    def __init__(self, columns: range) -> None:
        self.photos = load_sample_images().images
        corners = [(label, row, column) for label in (0, 1) for row in range(0, 379, 16) for column in columns]
        super().__init__(len(corners), [label for label, _, _ in corners], classes=("temple", "flower"))
        self.corners = corners

    def pixels(self, index: int) -> NDArray[np.uint8]:
        label, row, column = self.corners[index]
        return self.photos[label][row : row + 48, column : column + 48]


torch.manual_seed(0)
training, val = Windows(range(0, 400, 16)), Windows(range(448, 593, 16))
crops, whole = TrainTransform(size=32), EvalTransform(size=32, resize=32)
large, small = small_resnet(2, width=16), small_resnet(2, width=4)
settings = {"epochs": 3, "optimizer": {"name": "adamw", "lr": 0.003}}
with KDDataLoader(training, crops, batch_size=64) as batches, KDDataLoader(val, whole, batch_size=64) as checks:
    data = {"train_batches": batches, "validation": checks}
    train(Config(run_dir="runs/own_source", stage="baseline", train=settings), student=large, **data)
    config = Config(run_dir="runs/own_source", train=settings)
    result = train(config, student=small, teacher=large, **data).evaluations["val"]
print(f"{len(training)} windows, student {result.top1:.1%}, agreement {result.agreement:.1%}")
