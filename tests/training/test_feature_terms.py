"""Runs whose loss remembers earlier batches: in a queue, and in statistics of the teacher."""

from pathlib import Path

import pytest
import torch

from tests.training.tiny_run import run

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

TERMS = {
    "features": [
        {"loss": "relational", "queue_size": 50},
        {"loss": "logit_mse", "standardize": "channels", "weight": 0.5},
    ]
}


@pytest.mark.slow
def test_resume_is_exact(digits: Path) -> None:
    """Three batches of an epoch fill the queue in part, and the statistics rest between two and four."""

    def states(name: str, *epochs: int) -> dict[str, torch.Tensor]:
        for last in epochs:
            options = {"train__limit_train_batches": 3, "train__epochs": last, "distill": TERMS}
            folder = run(digits, name, **options).folder
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    undisturbed, later = states("remembers at once", 2), states("remembers later", 1, 2)
    assert undisturbed["distillation.standardizers.1.num_batches"] == 6
    assert undisturbed["distillation.queues.0.is_filled"].all()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, later[name]), name
