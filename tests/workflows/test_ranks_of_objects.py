"""Objects of the user's on two processes: the weights and numbers of one process, and each line printed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.training.sharding import full_state_dict
from kd_pipeline.workflows._train import train
from tests.training.rank_worker import run_ranks
from tests.training.tiny_run import distance, logged, result
from tests.workflows.objects import ROWS, config, network, run, teacher, tensors

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]

CHANGES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ema": {"ema": {"decay": 0.5}},
    "fsdp": {"strategy": "fsdp"},
}


def own_part(num_rows: int, start: int = 0) -> "DataLoader[Any]":
    """The rows of this rank."""
    data = TensorDataset(*tensors(num_rows, start))
    return DataLoader(data, batch_size=ROWS // 2, sampler=DistributedSampler(data, shuffle=False))


def whole(num_rows: int, start: int = 0) -> "DataLoader[Any]":
    """The rows of both ranks, in batches of those that they read together."""
    return DataLoader(TensorDataset(*tensors(num_rows, start)), batch_size=ROWS)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def numbers(evaluation: Evaluation) -> list[float]:
    return [evaluation.num_samples, evaluation.top1 or 0.0, evaluation.loss or 0.0, evaluation.agreement or 0.0]


def train_parts(folder: Path, rank: int) -> dict[str, Any]:
    """Weights and numbers of runs, and what they reported."""
    found: dict[str, Any] = {}
    for name, changes in CHANGES.items():
        student, lines = network(), list[str]()
        outcome = train(
            config(folder / name, **changes),
            student=student,
            teacher=teacher(),
            train_batches=own_part(96),
            validation=own_part(40, 200),
            optimizer=momentum,
            report=lines.append,
        )
        weights = {key: each.clone() for key, each in full_state_dict(student).items()}
        found[name] = {"weights": weights, "val": numbers(outcome.evaluations["val"]), "lines": lines}
    return found


Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(2, folder, train_parts)


@pytest.mark.parametrize("name", CHANGES)
def test_two_ranks_match_one_with_double_batch(tmp_path: Path, ranks: Ranks, name: str) -> None:
    student, alone = network(), {key: each for key, each in CHANGES[name].items() if key != "strategy"}
    objects = {"train_batches": whole(96), "validation": whole(40, 200), "optimizer": momentum}
    expected = numbers(run(tmp_path / "one", alone, student=student, **objects).evaluations["val"])
    folder, found = ranks
    for rank in found:
        assert distance(rank[name]["weights"], student.state_dict()) < 1e-6
        assert rank[name]["val"] == pytest.approx(expected, rel=1e-5)
    assert result(folder / name)["val"]["num_samples"] == 40
    assert [row["val/top1"] for row in logged(folder / name) if "val/top1" in row]


def test_result_is_reported_once(ranks: Ranks) -> None:
    folder, (first, second) = ranks
    assert first["ddp"]["lines"] and not second["ddp"]["lines"]
    log = (folder / "ddp" / "train.log").read_text(encoding="utf-8")
    assert [log.count(f"epoch {number}/2 ") for number in (1, 2)] == [1, 1]
