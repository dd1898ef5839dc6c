"""A LightningModule and a Trainer of your own read KDDataLoader: `python examples/lightning_module.py`."""

import lightning
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_pipeline import Arrays, EvalTransform, KDBatch, KDDataLoader, TrainTransform, losses
from kd_pipeline.models import small_resnet


class Classifier(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: KDBatch, number: int) -> Tensor:
        logits = self.network(batch.images)
        if batch.teacher:
            return losses.soft_target(logits, batch.teacher["logits"])
        return losses.task(logits, batch.labels)

    def validation_step(self, batch: KDBatch, number: int) -> None:
        self.log("top1", (self.network(batch.images).argmax(dim=1) == batch.labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.003)


lightning.seed_everything(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
train, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
large, small = Classifier(small_resnet(10, width=16)), Classifier(small_resnet(10, width=8))
with KDDataLoader(val, EvalTransform(size=16, resize=16), batch_size=64) as checks:
    for module, teacher in (large, None), (small, large.network):
        trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False)
        with KDDataLoader(train, TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), teacher, batch_size=64) as loader:
            trainer.fit(module, loader, checks)
print(f"student {trainer.callback_metrics['top1']:.1%}")
