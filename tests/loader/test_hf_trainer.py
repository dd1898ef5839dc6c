"""The Trainer of transformers takes a loader as it is, and resumes within an epoch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline import losses
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.loader.loader import KDDataLoader
from tests.training import networks, tiny_run

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::(transformers|accelerate|torch)")]

NUM_EPOCHS = 2
NUM_BATCHES = 5
"""Of 16 in an epoch; the last is not full."""


class Returns(nn.Module):
    """A student as those of transformers are: called by keyword, and it returns a `ModelOutput`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = networks.plain()

    def forward(self, pixel_values: Tensor) -> Any:
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.network(pixel_values))


def loss_of(student: nn.Module, batch: KDBatch) -> Tensor:
    logits = student(pixel_values=batch["images"]).logits
    return losses.soft_target(logits, batch["teacher"]["logits"], temperature=4.0, valid=batch["valid"])


class Distill(transformers.Trainer):
    """The whole of what a user writes."""

    def __init__(self, *args: Any, loader: KDDataLoader, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loader = loader

    def get_train_dataloader(self) -> KDDataLoader:
        return self.loader

    def compute_loss(self, model: nn.Module, inputs: KDBatch, return_outputs: bool = False, **_: Any) -> Tensor:
        assert type(inputs) is KDBatch and not return_outputs
        return loss_of(model, inputs)


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[KDDataLoader]:
    tiny_run.write_digits(tmp_path)
    with open_loader(tmp_path) as loader:
        yield loader


def open_loader(folder: Path) -> KDDataLoader:
    torch.manual_seed(1)
    source, teacher = folder / "odd67.npz", networks.plain()
    transform = TrainTransform(size=8, area=(0.5, 1.0), flip=0.0)
    return KDDataLoader(source, transform, teacher, batch_size=16, device="cpu", num_threads=1)


def trainer_of(folder: Path, loader: KDDataLoader) -> Distill:
    student = Returns()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=NUM_EPOCHS,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_steps=NUM_BATCHES + 2,
        save_strategy="steps",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return Distill(student, arguments, loader=loader, optimizers=(optimizer, schedule))


def weights_of(student: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in student.parameters()]


def plain_loop(folder: Path) -> list[Tensor]:
    student = Returns()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    with open_loader(folder) as loader:
        for _ in range(NUM_EPOCHS):
            for batch in loader:
                optimizer.zero_grad()
                loss_of(student, batch).backward()
                optimizer.step()
    return weights_of(student)


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_trains_as_a_plain_loop_and_resumes_within_an_epoch(loader: KDDataLoader, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, loader)
    assert trainer.num_examples(loader) == 67 and len(loader) == NUM_BATCHES
    trainer.train()
    assert trainer.state.global_step == NUM_EPOCHS * NUM_BATCHES
    wanted = weights_of(trainer.model)
    assert equal(wanted, plain_loop(tmp_path))
    checkpoint = tmp_path / "trainer" / f"checkpoint-{NUM_BATCHES + 2}"
    with open_loader(tmp_path) as fresh:
        resumed = trainer_of(tmp_path, fresh)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == NUM_EPOCHS * NUM_BATCHES
        assert equal(weights_of(resumed.model), wanted)
