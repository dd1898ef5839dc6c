"""Layers of two networks meet by index or name, through projectors that are trained too; the student sees no label.

Run it with `python examples/features_by_layer.py`.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits

from kd_pipeline import Arrays, Distillation, DistillSettings, EvalTransform, KDDataLoader, TrainTransform, evaluate
from kd_pipeline.losses import task
from kd_pipeline.models import small_resnet
from kd_pipeline.models.features import with_features

torch.manual_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
train, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
large, small = small_resnet(10, width=16), small_resnet(10, width=8)
optimizer = torch.optim.AdamW(large.parameters(), lr=0.003)
with KDDataLoader(train, crops, batch_size=64) as loader:
    for batch in (batch for _ in range(8) for batch in loader):
        optimizer.zero_grad()
        task(large(batch.images), batch.labels).backward()
        optimizer.step()

terms = [{"loss": "am_radio", "student": name, "teacher": name} for name in ("layer:4", "layer:-4")]
settings = DistillSettings(task_weight=0.0, distill_weight=1.0, features=terms)
with KDDataLoader(train, crops, with_features(large, ["layer:4", "layer:-4"]), batch_size=64) as loader:
    shapes = {"teacher_outputs": loader.teacher.outputs, "example": loader.example(), "num_classes": 10}
    loss_of = Distillation(settings, student=small, **shapes)
    optimizer = torch.optim.AdamW([*small.parameters(), *loss_of.parameters()], lr=0.003)
    for batch in (batch for _ in range(8) for batch in loader):
        with loss_of.student_features(small) as features:
            logits = small(batch.images)
        optimizer.zero_grad()
        loss_of(logits, features, batch, epoch=0, epochs=1).total.backward()
        optimizer.step()
with KDDataLoader(val, whole, batch_size=64) as loader:
    print(f"teacher {evaluate(large, loader).top1:.1%}, student {evaluate(small, loader).top1:.1%}")
