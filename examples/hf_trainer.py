"""The Trainer of transformers reads KDDataLoader; teacher and student return the ModelOutput of their library.

Run it with `python examples/hf_trainer.py`.
"""

import numpy as np
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from kd_pipeline import Arrays, EvalTransform, KDDataLoader, TrainTransform, evaluate, losses


def network(width: int) -> ResNetForImageClassification:
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width, 4 * width], "depths": [1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=10))


class DistillTrainer(Trainer):
    def get_train_dataloader(self):
        return self.train_dataset

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        outputs = model(batch["images"], batch["labels"])
        if "teacher" in batch:
            outputs.loss = losses.soft_target(outputs.logits, batch["teacher"]["logits"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


set_seed(0)
digits, held_out = load_digits(), np.arange(1797) % 5 == 0
train, val = (Arrays(np.uint8(15 * digits.images[rows]), digits.target[rows]) for rows in (~held_out, held_out))
crops, whole = TrainTransform(size=16, area=(0.8, 1.0), flip=0.0), EvalTransform(size=16, resize=16)
large, small = network(16), network(8)
arguments = TrainingArguments("runs/hf", num_train_epochs=6, learning_rate=0.005, save_strategy="no", report_to="none")
for model, teacher in (large, None), (small, large):
    with KDDataLoader(train, crops, teacher, batch_size=64) as loader:
        DistillTrainer(model, arguments, train_dataset=loader).train()
with KDDataLoader(val, whole, batch_size=64) as loader:
    print(f"teacher {evaluate(large, loader).top1:.1%}, student {evaluate(small, loader).top1:.1%}")
