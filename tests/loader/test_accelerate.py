"""A plain loop, Lightning, accelerate and `train` get the same batches from the same loader."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline import losses
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows import train
from tests.training import networks, tiny_run

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")
# Lightning warns about workers, loggers and options of the trainer.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

NUM_BATCHES = 20

Seen = list[tuple[Any, ...]]


def facts(batch: KDBatch) -> tuple[Any, ...]:
    """All fields of a batch as plain values."""
    assert batch.labels is not None
    pixels = hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()
    outputs = {name: tensor.tolist() for name, tensor in batch.teacher.items()}
    return batch.index.tolist(), batch.labels.tolist(), batch.valid.tolist(), pixels, outputs


def loss_of(student: torch.nn.Module, batch: KDBatch) -> Tensor:
    return losses.soft_target(student(batch.images), batch.teacher["logits"], temperature=4.0, valid=batch.valid)


@contextmanager
def opened(config: Config) -> Iterator[tuple[KDDataLoader, torch.nn.Module, torch.optim.Optimizer]]:
    with KDDataLoader.from_config(config, "train") as loader:
        student = networks.plain()
        yield loader, student, torch.optim.SGD(student.parameters(), lr=0.1)


def plain_loop(config: Config) -> Seen:
    seen = []
    with opened(config) as (loader, student, optimizer):
        for batch in islice(loader, NUM_BATCHES):
            optimizer.zero_grad()
            loss_of(student, batch).backward()
            optimizer.step()
            seen.append(facts(batch))
    return seen


def with_accelerate(config: Config) -> Seen:
    """The usual loop of accelerate."""
    seen = []
    accelerator = accelerate.Accelerator(cpu=True)
    with opened(config) as opened_parts:
        loader, student, optimizer = accelerator.prepare(*opened_parts)
        for batch in islice(loader, NUM_BATCHES):
            with accelerator.accumulate(student):
                optimizer.zero_grad()
                accelerator.backward(loss_of(student, batch))
                optimizer.step()
            seen.append(facts(batch))
    return seen


class Module(lightning.LightningModule):
    def __init__(self, student: torch.nn.Module) -> None:
        super().__init__()
        self.student = student
        self.seen: Seen = []

    def training_step(self, batch: KDBatch, number: int) -> Tensor:
        self.seen.append(facts(batch))
        return loss_of(self.student, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def with_lightning(config: Config) -> Seen:
    with opened(config) as (loader, student, _):
        module = Module(student)
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        lightning.Trainer(max_steps=NUM_BATCHES, accelerator="cpu", **options).fit(module, loader)
    return module.seen


def with_train(config: Config) -> Seen:
    seen: Seen = []
    step = DistillModule.training_step

    def recorded(module: DistillModule, batch: KDBatch, number: int) -> Tensor:
        seen.append(facts(batch))
        return step(module, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillModule, "training_step", recorded)
        train(config, plugins=[networks.__name__])
    return seen


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("digits")
    tiny_run.write_digits(folder)
    return tiny_run.settings(folder, "run", data__batch_size=4, train__epochs=1, train__limit_train_batches=NUM_BATCHES)


@pytest.fixture(scope="module")
def wanted(config: Config) -> Seen:
    return plain_loop(config)


@pytest.mark.slow
@pytest.mark.parametrize("consume", [with_accelerate, with_lightning, with_train])
def test_same_batches_as_plain_loop(config: Config, wanted: Seen, consume: Callable[[Config], Seen]) -> None:
    assert len(wanted) == NUM_BATCHES
    assert consume(config) == wanted


def test_accelerate_returns_loader_unchanged(config: Config) -> None:
    with opened(config) as (loader, *_):
        assert accelerate.Accelerator(cpu=True).prepare(loader) is loader
