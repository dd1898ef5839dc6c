"""A loop of your own: a network learns digits from their labels, then teaches a smaller one on the same crops.

Run it with `python examples/own_loop.py`.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from kd_pipeline import Arrays, EvalTransform, KDDataLoader, TrainTransform, evaluate, losses
from kd_pipeline.models import small_resnet


def fit(network: nn.Module, loader: KDDataLoader, epochs: int = 6) -> None:
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:  # one loop is one epoch, in a new order
            logits = network(batch.images)
            loss = losses.task(logits, batch.labels)
            if batch.teacher:
                loss = 0.1 * loss + 0.9 * losses.soft_target(logits, batch.teacher["logits"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


torch.manual_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
train, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.3, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
large, small = small_resnet(10, width=16), small_resnet(10, width=4)
for network, teacher in (large, None), (small, large):
    with KDDataLoader(train, crops, teacher, batch_size=64) as loader:
        fit(network, loader)
with KDDataLoader(val, whole, batch_size=64) as loader:
    print(f"teacher {evaluate(large, loader).top1:.1%}, student {evaluate(small, loader).top1:.1%}")
