"""Objects of the user's on two processes: the weights and numbers of one process, and each line printed once."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kd_pipeline import losses
from kd_pipeline.config.config import Config
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.training.sharding import full_state_dict
from kd_pipeline.workflows._train import train
from tests.training.rank_worker import run_ranks
from tests.training.tiny_run import distance, logged, result
from tests.workflows.objects import ROWS, StopBefore, Stopped, config, network, teacher, tensors

NUM_STEPS = 6
"""Of an epoch."""

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]


class WithLosses(nn.Module):
    """Returns a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, images: Tensor) -> dict[str, Any]:
        logits = self.body(images)
        return {"logits": logits, "losses": {"balance": logits.square().mean()}}


class Both(nn.Module):
    """Holds both networks, and compares them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = network(), network(5)

    def forward(self, images: Tensor) -> dict[str, Any]:
        logits = self.student(images)
        return {"logits": logits, "losses": {"soft": losses.soft_target(logits, self.teacher(images))}}


class Case(NamedTuple):
    """What differs between runs."""

    student: Callable[[], nn.Module] = network
    changes: Mapping[str, Any] = {}
    distill: Mapping[str, Any] = {}
    has_teacher: bool = True
    num_rows: int = 95
    """For training: the sampler of two ranks repeats one."""

    def config(self, folder: Path, *, num_ranks: int, **changes: Any) -> Config:
        changes |= {key: value for key, value in self.changes.items() if num_ranks > 1 or key != "strategy"}
        settings = config(folder, **changes)
        stage = settings.stage if self.has_teacher else "baseline"
        return settings.model_copy(update={"stage": stage, "distill": DistillSettings(**self.distill)})

    def objects(self) -> dict[str, Any]:
        return {"teacher": teacher()} if self.has_teacher else {}


# The mean of what a student returns itself is that of all rows where each rank has as many.
BALANCE = {"student_losses": {"balance": 0.1}}
SOFT = {"loss": None, "student_losses": {"soft": 2.0}}
CASES = {
    "ddp": Case(),
    "ema": Case(changes={"ema": {"decay": 0.5}}),
    "fsdp": Case(changes={"strategy": "fsdp"}),
    "own losses": Case(WithLosses, distill=BALANCE, num_rows=96),
    "own losses fsdp": Case(WithLosses, {"strategy": "fsdp"}, BALANCE, num_rows=96),
    "both networks": Case(Both, distill=SOFT, has_teacher=False, num_rows=96),
    "both networks fsdp": Case(Both, {"strategy": "fsdp"}, SOFT, has_teacher=False, num_rows=96),
}

RESUMED = ("ema", "fsdp", "own losses fsdp", "both networks", "both networks fsdp")


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


def train_case(name: str, folder: Path, callbacks: Sequence[Callback] = (), **changes: Any) -> dict[str, Any]:
    """Weights and numbers of a run on this rank, and what it reported."""
    case = CASES[name]
    student, lines = case.student(), list[str]()
    outcome = train(
        case.config(folder, num_ranks=2, **changes),
        **case.objects(),
        student=student,
        train_batches=own_part(case.num_rows),
        validation=own_part(41, 200),
        optimizer=momentum,
        callbacks=callbacks,
        report=lines.append,
    )
    weights = {key: each.clone() for key, each in full_state_dict(student).items()}
    return {"weights": weights, "val": numbers(outcome.evaluations["val"]), "lines": lines}


def train_parts(folder: Path, rank: int) -> dict[str, Any]:
    """Each case, and again as a run that is stopped and resumed."""
    found = {name: train_case(name, folder / name) for name in CASES}
    for name in RESUMED:
        stopped = folder / f"{name} resumed"
        with pytest.raises(Stopped):
            train_case(name, stopped, [StopBefore(NUM_STEPS + 1)], save_every_steps=1)
        distributed.barrier()
        found[f"{name} resumed"] = train_case(name, stopped, save_every_steps=1)
    return found


Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(2, folder, train_parts)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_match_one_with_double_batch(tmp_path: Path, ranks: Ranks, name: str) -> None:
    case = CASES[name]
    student = case.student()
    objects = {
        "train_batches": whole(case.num_rows),
        "validation": whole(41, 200),
        "optimizer": momentum,
        **case.objects(),
    }
    alone = train(case.config(tmp_path / "one", num_ranks=1), student=student, **objects)
    expected = numbers(alone.evaluations["val"])
    folder, found = ranks
    for rank in found:
        assert distance(rank[name]["weights"], student.state_dict()) < 1e-6
        assert rank[name]["val"] == pytest.approx(expected, rel=1e-5)
    wrote = folder / name if case.has_teacher else folder / name / "baseline"
    assert result(wrote)["val"]["num_samples"] == 41
    assert [row["val/top1"] for row in logged(wrote) if "val/top1" in row]


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_run_resumes_exactly(ranks: Ranks, name: str) -> None:
    folder, found = ranks
    for rank in found:
        for key, weight in rank[name]["weights"].items():
            assert torch.equal(weight, rank[f"{name} resumed"]["weights"][key]), key
        assert rank[name]["val"] == rank[f"{name} resumed"]["val"]
    log = next((folder / f"{name} resumed").rglob("train.log")).read_text(encoding="utf-8")
    assert f"at epoch 2 of 2, step {NUM_STEPS + 1}" in log
    assert re.search(r"epoch 2/2 .* \d+\.\d s\n", log), "the time since it was resumed"


def test_result_is_reported_once(ranks: Ranks) -> None:
    folder, (first, second) = ranks
    assert first["ddp"]["lines"] and not second["ddp"]["lines"]
    log = (folder / "ddp" / "train.log").read_text(encoding="utf-8")
    assert [log.count(f"epoch {number}/2 ") for number in (1, 2)] == [1, 1]
