"""Accelerate, with any number of processes: `accelerate launch --cpu --num-processes 2 examples/accelerate_loop.py`."""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits

from kd_pipeline import Arrays, EvalTransform, KDDataLoader, TrainTransform, losses
from kd_pipeline.models import small_resnet

accelerator = Accelerator()
set_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
train, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
large, small = small_resnet(10, width=16), small_resnet(10, width=8)
for network, teacher in (large, None), (small, large):
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    loader = KDDataLoader(train, crops, teacher, batch_size=64, device=accelerator.device)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    for _ in range(8):
        for batch in loader:
            logits = network(batch.images)
            loss = losses.task(logits, batch.labels)
            if teacher is not None:
                loss = losses.soft_target(logits, batch.teacher["logits"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    loader.close()
loader = accelerator.prepare(KDDataLoader(val, whole, batch_size=64, device=accelerator.device))
small.eval()
found = []
for batch in loader:
    hits = small(batch.images).argmax(dim=1) == batch.labels
    found.append(accelerator.gather_for_metrics((hits, batch.valid)))  # rows that pad the last batch are not valid
top1 = torch.cat([hits[valid] for hits, valid in found]).float().mean()
accelerator.print(f"student {top1:.1%} of {sum(int(valid.sum()) for _, valid in found)} digits")
