"""No NaN reaches the weights, a checkpoint or an export, and a run that meets one says where."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline._core.finite import first_nonfinite
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import NonFiniteError
from kd_pipeline.losses.distillation import LossTerms
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO
from kd_pipeline.training.nonfinite import StepGuard, TrainedBatch, gradient_norm
from kd_pipeline.workflows._train import train
from tests.training import networks
from tests.training.rank_worker import run_ranks, spoil_rank_one
from tests.training.tiny_run import NUM_TRAIN, logged, run, settings, weights

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

STEPS = NUM_TRAIN // 16
"""Steps of an epoch; a run has two epochs."""
SPOILED = {"student": {"factory": "tests.training.networks:spoiled"}}
LAST = Path("checkpoints") / "last.ckpt"


@pytest.fixture
def spoil() -> Iterator[set[int]]:
    """Numbers of the training passes in which the student `spoiled` returns NaN."""
    networks.SPOILED.clear()
    yield networks.SPOILED
    networks.SPOILED.clear()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every checkpoint that a run saves, in their order."""
    checkpoints: list[dict[str, Any]] = []
    save = AtomicCheckpointIO.save_checkpoint

    def keep(self: Any, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        checkpoints.append(copy.deepcopy(checkpoint))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", keep)
    return checkpoints


def same(first: Any, second: Any) -> bool:
    """Whether nested values are equal, tensors included."""
    match first:
        case Tensor():
            return torch.equal(first, second)
        case dict():
            return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
        case list() | tuple():
            return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def sqrt_of_zero(logits: Tensor, batch: KDBatch) -> Tensor:
    """A finite loss whose gradient is NaN."""
    return (logits * 0).sum().sqrt()


def stop_of(digits: Path, name: str, **changes: Any) -> str:
    with pytest.raises(NonFiniteError) as caught:
        train(settings(digits, name, **changes), plugins=[networks.__name__, __name__])
    return str(caught.value)


def test_first_nan_stops_before_the_step(digits: Path, spoil: set[int]) -> None:
    spoil.add(STEPS + 1)
    message = stop_of(digits, "stopped", **SPOILED, train__save_every_steps=1)
    assert "the loss is not finite in epoch 2 at step 7 (steps are counted from 0, as in metrics.csv)" in message
    assert re.search(
        r"batch 1 of the epoch: loss nan of task nan \(weight 0.1\) \+ distill nan \(weight 0.9, ", message
    )
    assert "temperature 4)" in message and "lower train.optimizer.lr" in message.lower()
    listed = re.findall(r"  sample (\d+), .*train\.npz\[(\d+)\]: NaN or inf in the student's 'logits'", message)
    assert len(listed) == 10 and all(index == place for index, place in listed)
    assert "and 6 more samples, 6 with NaN or inf" in message
    last = load_checkpoint(digits / "stopped" / LAST)
    assert last["global_step"] == STEPS + 1
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values())
    assert not (digits / "stopped" / "exported").exists()


def test_skipped_step_changes_nothing(digits: Path, spoil: set[int], saved: list[dict[str, Any]]) -> None:
    spoil.update({2, 4})
    adam = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    options = {"train__save_every_steps": 1, "train__optimizer": adam, "train__ema": {"decay": 0.9}}
    relations = {"loss": "relational", "queue_size": 100, "standardize": "channels"}
    options["distill"] = {"features": [relations]}  # with a queue and statistics, which learn in the forward pass
    folder = run(digits, "skipped", **SPOILED, **options, train__max_nonfinite_steps=1, data__val=None).folder
    before, after = (checkpoint for checkpoint in saved if checkpoint["global_step"] in (2, 3))
    assert before["state_dict"]["distillation.queues.0.is_filled"].sum() == 32
    assert before["state_dict"]["distillation.standardizers.0.num_batches"] == 2
    for part in ("state_dict", "ema", "optimizer_states"):
        assert same(before[part], after[part]), part
    assert first_nonfinite(networks.spoiled()) is None
    assert all(tensor.isfinite().all() for tensor in saved[-1]["state_dict"].values())
    counts = {int(row["step"]): row["train/skipped_steps"] for row in logged(folder) if "train/skipped_steps" in row}
    assert counts == {step: (step >= 2) + (step >= 4) for step in range(2 * STEPS)}
    text = (folder / "train.log").read_text()
    assert text.count("step skipped, 1 in a row of at most 1: the loss is not finite in epoch 1 at step") == 2
    assert saved[-1]["skipped_steps"] == {"num_skipped": 2, "num_in_a_row": 0}


def test_too_many_in_a_row_stop(digits: Path, spoil: set[int]) -> None:
    spoil.update({2, 3, 5, 6, 7})
    message = stop_of(digits, "many", **SPOILED, train__max_nonfinite_steps=2)
    assert "in epoch 2 at step 7" in message and "train.max_nonfinite_steps=2 allows no more in a row" in message


def nan_for_one(logits: Tensor, batch: KDBatch) -> Tensor:
    """NaN for every batch with sample 17."""
    return logits.square().mean() * torch.where(batch.index.eq(17).any(), torch.nan, 1.0)


@pytest.mark.slow
def test_advice_to_skip_works_on_resume(digits: Path) -> None:
    loss = {"loss": f"{__name__}:{nan_for_one.__name__}"}
    message = stop_of(digits, "advised", distill=loss)
    advised = re.search(r"skip such steps with train\.max_nonfinite_steps=(\d)", message)
    assert advised is not None
    config = settings(digits, "advised", distill=loss, train__max_nonfinite_steps=int(advised[1]))
    folder = train(config, plugins=[networks.__name__, __name__]).folder
    assert load_checkpoint(folder / LAST)["skipped_steps"]["num_skipped"] == 2  # once per epoch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_that_is_not_finite_stops(digits: Path, accumulate: int) -> None:
    message = stop_of(
        digits,
        f"gradient{accumulate}",
        distill={"loss": f"{__name__}:{sqrt_of_zero.__name__}"},
        train__accumulate=accumulate,
    )
    assert message.startswith("the gradient has norm nan in epoch 1 at step 0")
    assert "distill 0 (weight 1)" in message and "in the student's 'logits'" not in message


@pytest.mark.slow
def test_nan_within_an_accumulated_step(digits: Path, spoil: set[int], saved: list[dict[str, Any]]) -> None:
    spoil.add(2)
    message = stop_of(digits, "group", **SPOILED, train__accumulate=3)
    assert "at step 0" in message and "batch 2 of the epoch" in message
    spoil.clear()
    spoil.add(3)
    options: dict[str, Any] = {"train__accumulate": 3, "train__save_every_steps": 1, "data__val": None}
    run(digits, "group skipped", **SPOILED, **options, train__max_nonfinite_steps=1)
    first, second, *_ = saved
    assert (first["global_step"], second["global_step"]) == (1, 2)
    assert same(first["state_dict"], second["state_dict"])


@pytest.mark.slow
def test_weights_that_overflow_are_not_saved(digits: Path) -> None:
    options: dict[str, Any] = {"train__optimizer": {"name": "sgd", "lr": 6e4}, "train__precision": "16-true"}
    options["distill"] = {"task_weight": 100.0, "distill_weight": 100.0}
    message = stop_of(digits, "overflow", **options, train__save_every_steps=1)
    assert "after 1 steps the weights hold NaN or inf, first in 'student.0.weight'" in message
    assert list((digits / "overflow").rglob("*.ckpt")) == []
    # Nor by validation or the end of the epoch.
    message = stop_of(digits, "at end", **options, train__limit_train_batches=1)
    assert "the run stopped before validating and saving them" in message
    assert list((digits / "at end").rglob("*.ckpt")) == []
    message = stop_of(digits, "later", **options, train__max_nonfinite_steps=5)
    assert "The weights held NaN or inf before this step, first in 'student.0.weight'" in message
    assert "train.max_nonfinite_steps=8" not in message


@pytest.mark.slow
def test_nan_on_one_rank_stops_all(digits: Path) -> None:
    for found in run_ranks(2, digits, spoil_rank_one):
        for name in ("ddp", "accumulated", "fsdp"):
            message = found[name]
            assert "the loss is not finite in epoch 1 at step" in message, message
            assert "rank 1, batch 2 of the epoch: loss nan" in message and "rank 0, batch" not in message
        assert found["skipped"] == ["", 1]


# Parts


def trained(**rows: list[int]) -> TrainedBatch:
    """Of 12 rows; in `rows` are those with NaN, and those that are not valid."""

    def spoiled(name: str, *shape: int) -> Tensor:
        tensor = torch.zeros(12, *shape)
        tensor[rows.get(name, [])] = math.nan
        return tensor

    valid = torch.ones(12, dtype=torch.bool)
    valid[rows.get("invalid", [])] = False
    batch = KDBatch(
        images=spoiled("images", 3, 2, 2),
        labels=None,
        index=torch.arange(100, 112),
        valid=valid,
        teacher={"logits": spoiled("teacher", 4), "layer3": spoiled("layer3", 5, 2, 2)},
    )
    loss = torch.tensor(math.nan)
    terms = LossTerms(loss, {"distill": loss}, {"distill": 0.5}, None)
    return TrainedBatch(7, batch, {"logits": spoiled("student", 4)}, terms, {})


def message_for(**rows: list[int]) -> str:
    guard = StepGuard(0, sample_name=lambda index: f"{index}.jpg")
    guard.start_step([])
    guard.watch(trained(**rows))
    with pytest.raises(NonFiniteError) as caught:
        guard.decide(nn.Linear(2, 2), "epoch 0", num_bad=guard.num_bad(), gradient_norm=torch.tensor(1.0))
    return str(caught.value)


def test_samples_with_nan_come_first() -> None:
    lines = message_for(student=[3, 11], teacher=[11], layer3=[5], invalid=[3]).splitlines()
    assert lines[1] == "batch 7 of the epoch: loss nan of distill nan (weight 0.5)"
    assert lines[2] == "  sample 105, 105.jpg: NaN or inf in the teacher's 'layer3'"
    assert lines[3] == "  sample 111, 111.jpg: NaN or inf in the teacher's 'logits' and the student's 'logits'"
    assert lines[4] == "  sample 100, 100.jpg"
    assert lines[12] == "  and 1 more samples"
    assert not any("103" in line for line in lines)  # a row that is not valid is in no loss


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ({"teacher": [0], "student": [0]}, "The teacher returns NaN or inf for these images"),
        ({"images": [0], "student": [0]}, "The images themselves hold NaN or inf"),
        ({"student": [0]}, "Lower train.optimizer.lr"),
        ({"invalid": list(range(12))}, "No row of the batch is valid"),
        ({}, "Lower train.optimizer.lr"),
    ],
)
def test_advice_fits_the_cause(rows: dict[str, list[int]], advice: str) -> None:
    message = message_for(**rows)
    assert advice in message
    assert ("Lower train" in message) == (advice.startswith("Lower"))
    assert ("train.max_nonfinite_steps" in message) == ("invalid" not in rows)


def test_excluded_classes_are_no_cause() -> None:
    batch = trained(student=[0])
    excluding = torch.zeros(12, 4).masked_fill(torch.arange(4) == 1, -math.inf)
    found = replace(batch, batch=batch.batch.replace(teacher={"logits": excluding}))
    guard = StepGuard(0, sample_name=str)
    guard.start_step([])
    guard.watch(found)
    with pytest.raises(NonFiniteError, match=r"Lower train\.optimizer\.lr"):
        guard.decide(nn.Linear(2, 2), "epoch 0", num_bad=guard.num_bad(), gradient_norm=torch.tensor(1.0))


def test_first_nonfinite() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    net.register_buffer("mask", torch.full((2, 2), -math.inf))
    assert first_nonfinite(net) is None and first_nonfinite(nn.ReLU()) is None
    for name, value in (("0.weight", math.inf), ("1.running_var", math.inf), ("1.running_mean", math.nan)):
        spoiled = copy.deepcopy(net)
        spoiled.state_dict()[name].view(-1)[-1] = value
        assert first_nonfinite(spoiled) == name
    net.get_buffer("mask")[0, 0] = math.nan
    assert first_nonfinite(net) == "mask"


def test_gradient_norm_in_half_precision() -> None:
    gradients = [torch.full((100,), 3e4, dtype=torch.float16), torch.ones(1, dtype=torch.float16)]
    assert float(gradient_norm(gradients)) == pytest.approx(3e5, rel=1e-3)
    assert math.isnan(gradient_norm([torch.tensor([1.0, math.nan])]))


@pytest.mark.slow
def test_finite_run_is_unchanged_by_the_option(digits: Path) -> None:
    batchnorm = {"factory": "tests.training.networks:with_batchnorm"}
    usual = run(digits, "usual", student=batchnorm).folder
    watched = run(digits, "watched", student=batchnorm, train__max_nonfinite_steps=3).folder
    assert same(weights(usual), weights(watched))
