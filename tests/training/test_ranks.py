"""Several processes on gloo: equal numbers of steps, each image once, and the weights of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows import stage
from tests.training import tiny_run
from tests.training.rank_worker import BATCH_SIZE, FEATURES_ONLY, RELATIONS, SIZES, do_all, run_ranks
from tests.training.tiny_run import distance, logged, run, weights

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture(scope="module")
def ranks(digits: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank read and ended with, by number of ranks."""
    return {num_ranks: run_ranks(num_ranks, digits, do_all) for num_ranks in (2, 4)}


def run_alone(digits: Path, name: str, **changes: Any) -> Path:
    """The folder of a run in one process, with batches of as many images as two ranks have together."""
    split = tiny_run.split(digits, "odd67", tiny_run.TRAIN) | {"last_batch": "keep"}
    return run(digits, name, data__train=split, data__batch_size=64, **changes).folder


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
def test_ranks_read_each_image_once_in_equal_steps(
    ranks: dict[int, list[dict[str, Any]]], num_ranks: int, size: int, last_batch: str
) -> None:
    seen = [rank["read"][f"{size} {last_batch}"] for rank in ranks[num_ranks]]
    assert {len(batches) for batches in seen} == {-(-size // (BATCH_SIZE * num_ranks))}
    assert sorted(index for batches in seen for batch in batches for index in batch) == list(range(size))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_drop_leaves_full_batches(ranks: dict[int, list[dict[str, Any]]], num_ranks: int, size: int) -> None:
    seen = [rank["read"][f"{size} drop"] for rank in ranks[num_ranks]]
    num_batches = size // (BATCH_SIZE * num_ranks)
    if num_batches == 0:
        assert len(set(seen)) == 1 and f"do not fill a batch of {BATCH_SIZE} on {num_ranks} rank(s)" in seen[0]
        return
    assert [[len(batch) for batch in batches] for batches in seen] == [[BATCH_SIZE] * num_batches] * num_ranks
    indices = [index for batches in seen for batch in batches for index in batch]
    assert len(set(indices)) == len(indices) == num_batches * BATCH_SIZE * num_ranks


@pytest.mark.slow
def test_ranks_end_with_same_state(digits: Path, ranks: dict[int, list[dict[str, Any]]]) -> None:
    first, *others = (rank["state"] for rank in ranks[4])
    for other in others:
        assert distance(first, other) == 0
    (row,) = [row for row in logged(digits / "small") if "val/loss" in row]
    assert row["step"] == 1
    result = tiny_run.result(digits / "small")
    # Every rank validated the network that is exported.
    assert row["val/loss"] == pytest.approx(result["val"]["loss"], rel=1e-6)


@pytest.mark.slow
def test_two_ranks_match_one_with_double_batch(digits: Path, ranks: dict[int, list[dict[str, Any]]]) -> None:
    single = run_alone(digits, "single")
    # Sums of up to 64 float32 gradients in a different order: units in the last place of weights below 1. The mean of
    # the ranks' means would be off by 1e-3 and more.
    assert distance(weights(single), weights(digits / "halves")) < 1e-6
    assert distance(weights(single), weights(digits / "quarters")) < 1e-6
    for ours, theirs in zip(logged(single), logged(digits / "halves"), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name in {"train/loss", "train/task", "train/distill", "train/top1", "val/loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.slow
def test_two_ranks_match_one_with_parameters_that_no_term_reaches(
    digits: Path, ranks: dict[int, list[dict[str, Any]]]
) -> None:
    single = run_alone(digits, "single features", **FEATURES_ONLY)
    for name in ("features", "sharded"):
        assert distance(weights(single), weights(digits / name)) < 1e-6, name
    assert not torch.equal(weights(single)["3.weight"], weights(digits / "halves")["3.weight"])


@pytest.mark.slow
def test_two_ranks_share_queue_and_statistics(digits: Path, ranks: dict[int, list[dict[str, Any]]]) -> None:
    first, second = ({name: each.double() for name, each in rank["relations"].items()} for rank in ranks[2])
    assert distance(first, second) == 0
    single = run_alone(digits, "single relations", distill=RELATIONS)
    state = torch.load(single / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert distance({name: each.double() for name, each in state.items()}, first) < 1e-5
    assert first["distillation.queues.0.is_filled"].all()


def test_sync_batchnorm_on_cpu_is_refused(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(digits, "sync alone", train__sync_batchnorm=True, train__epochs=1, train__limit_train_batches=1)
    monkeypatch.setattr(stage, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"train\.sync_batchnorm: torch synchronizes BatchNorm on GPUs only"):
        run(digits, "sync", train__sync_batchnorm=True)
