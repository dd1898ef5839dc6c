"""Plain DistributedDataParallel; each process reads its own part of every epoch.

Run it with `torchrun --standalone --nproc-per-node 2 examples/ddp.py`.
"""

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

from kd_pipeline import Arrays, EvalTransform, KDDataLoader, TrainTransform, evaluate, losses
from kd_pipeline.models import small_resnet

dist.init_process_group("gloo")
torch.manual_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
train, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
large, small = small_resnet(10, width=16), small_resnet(10, width=8)
for network, teacher in (large, None), (small, large):
    parallel = DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    with KDDataLoader(train, crops, teacher, batch_size=32, device="cpu") as loader:
        for _ in range(8):
            for batch in loader:
                logits = parallel(batch.images)
                loss = losses.task(logits, batch.labels)
                if teacher is not None:
                    loss = losses.soft_target(logits, batch.teacher["logits"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
with KDDataLoader(val, whole, batch_size=64, device="cpu") as loader:
    result = evaluate(small, loader)
if dist.get_rank() == 0:
    print(f"student {result.top1:.1%} of {result.num_samples} digits, {dist.get_world_size()} processes")
dist.destroy_process_group()
