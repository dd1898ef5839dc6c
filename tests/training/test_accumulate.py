"""Batches that are accumulated count by their valid rows: a step is that of the one large batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline import losses
from kd_pipeline.batch import KDBatch
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.training.module import DistillModule
from tests.training import networks, tiny_run
from tests.training.tiny_run import distance, logged, run, settings, weights

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def odd(digits: Path, last_batch: str) -> dict[str, Any]:
    """67 training images: with batches of 16, the last one has 3."""
    return tiny_run.split(digits, "odd67", tiny_run.TRAIN) | {"last_batch": last_batch}


@pytest.mark.slow
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_smaller_last_group_is_one_batch(digits: Path, last_batch: str, clip: float | None) -> None:
    options: dict[str, Any] = {"data__train": odd(digits, last_batch), "train__clip": clip}
    options["train__log_gradient_norm"] = True
    name = f"{last_batch} {clip}"
    whole = run(digits, f"{name} whole", **options, data__batch_size=32).folder
    parts = run(digits, f"{name} parts", **options, data__batch_size=16, train__accumulate=2).folder
    # Sums of up to 32 float32 gradients in a different order. Counted as a full group, the 3 images are off by 1e-2.
    assert distance(weights(whole), weights(parts)) < 1e-6
    norms = [[row["train/gradient_norm"] for row in logged(folder)] for folder in (whole, parts)]
    assert len(norms[0]) == 6 and norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("batch_size", [10, 12])
def test_groups_match_a_plain_loop(digits: Path, batch_size: int) -> None:
    """Of 10 batches in groups of 3, the last group is one batch of 6 images; 8 batches of 12 leave two full ones."""
    changes: dict[str, Any] = {"data__batch_size": batch_size, "train__accumulate": 3, "train__epochs": 1}
    changes["data__train"] = tiny_run.split(digits, "train", tiny_run.TRAIN) | {"last_batch": "keep"}
    config = settings(digits, f"plain{batch_size}", **changes)
    torch.manual_seed(config.seed)
    student = networks.plain()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    with KDDataLoader.from_config(config, "train") as loader:
        batches = list(loader)
    for start in range(0, len(batches), 3):
        plain_step(student, optimizer, batches[start : start + 3])
    found = weights(run(digits, f"plain{batch_size}", **changes).folder)
    assert distance(found, student.state_dict()) < 1e-6


def plain_step(student: nn.Module, optimizer: torch.optim.Optimizer, batches: list[KDBatch]) -> None:
    images, labels, logits = (
        torch.cat(tensors)
        for tensors in zip(*((batch.images, batch.labels, batch.teacher["logits"]) for batch in batches), strict=True)
    )
    found: Tensor = student(images)
    loss = 0.1 * losses.task(found, labels) + 0.9 * losses.soft_target(found, logits, temperature=4.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_group_without_valid_rows_has_gradient_zero(
    digits: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    original = DistillModule.training_step

    def without_rows(self: DistillModule, batch: KDBatch, number: int) -> Tensor:
        return original(self, batch.replace(valid=torch.zeros_like(batch.valid)), number)

    name, options = f"none{accumulate}", {"train__epochs": 1, "train__accumulate": accumulate}
    torch.manual_seed(settings(digits, name).seed)
    untrained = networks.plain().state_dict()
    monkeypatch.setattr(DistillModule, "training_step", without_rows)
    assert distance(weights(run(digits, name, **options).folder), untrained) == 0
