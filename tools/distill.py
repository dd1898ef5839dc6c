"""A distillation loop to copy: train a student on the batches of KDDataLoader, with or without a teacher.

    python tools/distill.py configs/digits.yaml train.epochs=3

needs the teacher that the config names; `kd-pipeline demo` trains the one of configs/digits.yaml.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kd_pipeline import Distillation, KDDataLoader, load_config
from kd_pipeline.config.config import DistillSettings, TrainSettings
from kd_pipeline.models.resnet import small_resnet


def fit(
    student: nn.Module,
    loader: KDDataLoader,
    train: TrainSettings,
    distill: DistillSettings,
    on_step: Callable[[int, Tensor], None] = lambda num_images, loss: None,
) -> None:
    """Train the student in place with the loss of `distill`, or with the labels alone if the loader has no teacher.

    `on_step` receives the number of images and the loss, still on its device.
    """
    loss_of = Distillation(
        distill,
        student=student,
        teacher_outputs=loader.teacher.outputs if loader.teacher else None,
        image_shape=loader.transform.image_shape,
        num_classes=len(loader.classes),
        labels_are_soft=loader.mix is not None,
    )
    parameters = [*student.parameters(), *loss_of.parameters()]  # of projectors, for terms on features
    lr, num_steps = train.optimizer.lr, train.epochs * len(loader)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps)
    for epoch in range(loader.epoch, train.epochs):
        student.train()
        for number, batch in enumerate(loader):  # one loop is one epoch
            with loss_of.student_features(student) as features:
                logits = student(batch.images)
            loss = loss_of(logits, features, batch, epoch=epoch + number / len(loader), epochs=train.epochs).total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step(len(batch), loss.detach())
        if not loss.isfinite():  # once per epoch, as it waits for a GPU; a student that holds NaN keeps it
            raise FloatingPointError(f"the loss is {loss.item()}; lower train.optimizer.lr")


@torch.no_grad()
def evaluate(student: nn.Module, loader: KDDataLoader) -> tuple[float, float | None]:
    """Return top-1 accuracy and, if the loader has a teacher, agreement with its top-1; both from 0 to 1."""
    student.eval()
    num_correct = num_agreed = num_images = torch.zeros((), device=loader.device)
    for batch in loader:
        predicted = student(batch.images).argmax(dim=1)
        num_images = num_images + batch.valid.sum()
        num_correct = num_correct + (predicted.eq(batch.labels) & batch.valid).sum()
        if batch.teacher:
            num_agreed = num_agreed + (predicted.eq(batch.teacher["logits"].argmax(dim=1)) & batch.valid).sum()
    agreement = float(num_agreed / num_images) if loader.teacher else None
    return float(num_correct / num_images), agreement


def main(path: str, *overrides: str) -> None:
    """Train a small student with the config at `path`, and print its accuracy."""
    config = load_config(path, overrides)
    torch.manual_seed(config.seed)
    with KDDataLoader.from_config(config, "train") as train:
        student = small_resnet(len(train.classes), width=8).to(train.device)
        fit(student, train, config.train, config.distill)
        with KDDataLoader.from_config(config, "val", teacher=train.teacher) as val:
            top1, agreement = evaluate(student, val)
    print(f"top-1 {top1:.1%}, agreement with the teacher {agreement:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
