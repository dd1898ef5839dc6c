"""A run with objects that stopped within an epoch ends with the weights of one that did not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.workflows.objects import ROWS, StopBefore, Stopped, assert_same, batches, run, tensors
from tests.workflows.test_own_loaders import dali_loader

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]

EVERY, STOP = 4, 9
"""Steps between checkpoints, and the step at which a run fails: the last checkpoint is within the second epoch of 6."""


class Positioned:
    """Shuffles with a generator of its own, and keeps its position as the loaders of torchdata do."""

    batch_size = ROWS

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)
        self.began, self.done, self.num_read = self.generator.get_state(), 0, 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = tensors()
        if self.done == 0:
            self.began = self.generator.get_state()
        else:
            self.generator.set_state(self.began)
        order = torch.randperm(len(labels), generator=self.generator).split(ROWS)
        for rows in order[self.done :]:
            self.done += 1
            self.num_read += 1
            if self.done == len(order):
                self.done = 0
            yield images[rows], labels[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"began": self.began, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.began, self.done = state["began"], state["done"]
        self.generator.set_state(self.began)
        if self.done == 0:
            torch.randperm(96, generator=self.generator)


def of_torch() -> "DataLoader[Any]":
    """Its order follows from torch's random state."""
    return DataLoader(TensorDataset(*tensors()), batch_size=ROWS, shuffle=True)


def with_dropout() -> nn.Module:
    """Draws from torch's random state in each step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(192, 10))


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


LOADERS: dict[str, Callable[[], Any]] = {
    "list of tuples": batches,
    "torch loader": of_torch,
    "loader with a state": Positioned,
    "loader of dali": dali_loader,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_run_that_stopped_within_an_epoch_ends_the_same(tmp_path: Path, kind: str) -> None:
    def go(name: str, *callbacks: Any) -> tuple[nn.Module, Any]:
        student, loader = with_dropout(), LOADERS[kind]()
        changes = {"save_every_steps": EVERY}
        objects = {"student": student, "train_batches": loader, "optimizer": momentum, "callbacks": callbacks}
        try:
            run(tmp_path / name, changes, **objects)
        finally:
            if hasattr(loader, "close"):
                loader.close()
        return student, loader

    whole, _ = go("whole")
    with pytest.raises(Stopped):
        go("parts", StopBefore(STOP))
    saved = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 * EVERY
    resumed, loader = go("parts")
    assert_same(resumed, whole)
    if isinstance(loader, Positioned):
        assert loader.num_read <= 1 + 6 - 2 * EVERY % 6  # the first batch is looked at


def test_error_after_resuming_within_an_epoch_is_not_blamed_on_the_checkpoint(tmp_path: Path) -> None:
    changes = {"save_every_steps": EVERY}
    with pytest.raises(Stopped):
        run(tmp_path, changes, callbacks=[StopBefore(STOP)])
    with pytest.raises(ValueError, match=r"^mine$"):
        run(tmp_path, changes, callbacks=[StopBefore(STOP, ValueError("mine"))])
