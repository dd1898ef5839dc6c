"""A toy training, milliseconds per step, that depends on everything a checkpoint must hold."""

import logging
import os
import random
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO, SaveLastAndBest
from kd_pipeline.training.signals import StopOnSignal

NUM_BATCHES = 6
NUM_EPOCHS = 3


class Loader:
    """Batches that are a function of the position, which is state, as in a `KDDataLoader`."""

    def __init__(self) -> None:
        self.epoch = self.batch = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[Tensor]:
        if self.batch == NUM_BATCHES:
            self.epoch, self.batch = self.epoch + 1, 0
        while self.batch < NUM_BATCHES:
            self.batch += 1
            yield torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * self.epoch + self.batch))

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch + self.batch // NUM_BATCHES:
            self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


class Module(lightning.LightningModule):
    """Two layers with dropout, and noise from Python and NumPy; logs one of `scores` after each epoch."""

    def __init__(self, scores: list[float], at_step: Callable[[], None]) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.scores, self.at_step = scores, at_step

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        self.at_step()
        return self.student(batch).square().mean() * (1 + random.random() + np.random.rand())

    def on_train_epoch_end(self) -> None:
        if self.scores:
            self.log("val/top1", self.scores[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train(
    folder: Path,
    *,
    resume: Path | None = None,
    scores: list[float] | None = None,
    at_step: Callable[[], None] = lambda: None,
    every_n_steps: int | None = None,
    monitor: str = "val/top1",
    mode: Any = "max",
    io: Any = None,
    is_measured: Callable[[str], bool] = lambda metric: True,
    average_best: int | None = None,
    **options: Any,
) -> tuple[Module, SaveLastAndBest]:
    """Train into `folder`, or resume from `resume`; calls `at_step` in each step, passes `options` to the trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    module = Module(scores or [], at_step)
    saver = SaveLastAndBest(
        folder,
        student=module.student.state_dict,
        monitor=monitor if scores else None,
        mode=mode,
        every_n_steps=every_n_steps,
        is_measured=is_measured,
        average_best=average_best,
    )
    trainer = lightning.Trainer(
        max_epochs=NUM_EPOCHS,
        accelerator="cpu",
        logger=False,
        callbacks=[StopOnSignal(saver.save_last), saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=[io or AtomicCheckpointIO()],
        **options,
    )
    trainer.fit(module, Loader(), ckpt_path=resume)
    return module, saver


def train_in_child(
    steps: Connection, folder: Path, prepare: Callable[[], Any], pause: Callable[[], Any], options: Any
) -> None:
    """In a child process: `train`, announcing each step on `steps` before the pause."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # As in a terminal: pytest itself may run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()

    def at_step() -> None:
        steps.send("step")
        pause()

    train(folder, at_step=at_step, **options)


@contextmanager
def max_file_size(num_bytes: int) -> Iterator[None]:
    """Limit the files of this process: a larger write fails halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
