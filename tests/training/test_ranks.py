"""Several processes on gloo: the same number of steps on all, every image once, and the weights of one process."""

from pathlib import Path
from typing import Any

import pytest

from kd_pipeline.errors import ConfigError
from tests.training import nets
from tests.training.nets import distance, logged, run, weights
from tests.training.on_ranks import BATCH_SIZE, SIZES, do_all, start

# Lightning has advice on workers, loggers and the trainer's options, none of which is about ranks.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and an untaught teacher."""
    folder = tmp_path_factory.mktemp("digits")
    nets.write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(digits: Path) -> dict[int, list[dict[str, Any]]]:
    """What each rank of 2 and of 4 has seen and come to."""
    return {num_ranks: start(num_ranks, digits, do_all) for num_ranks in (2, 4)}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
def test_all_ranks_take_the_same_number_of_steps_and_read_every_image_once(
    ranks: dict[int, list[dict[str, Any]]], num_ranks: int, size: int, last_batch: str
) -> None:
    seen = [rank["read"][f"{size} {last_batch}"] for rank in ranks[num_ranks]]
    assert {len(batches) for batches in seen} == {-(-size // (BATCH_SIZE * num_ranks))}
    assert sorted(index for batches in seen for batch in batches for index in batch) == list(range(size))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_dropping_leaves_whole_batches_of_different_images_or_one_message_on_every_rank(
    ranks: dict[int, list[dict[str, Any]]], num_ranks: int, size: int
) -> None:
    seen = [rank["read"][f"{size} drop"] for rank in ranks[num_ranks]]
    num_batches = size // (BATCH_SIZE * num_ranks)
    if num_batches == 0:
        assert len(set(seen)) == 1 and f"no whole batch of {BATCH_SIZE} on {num_ranks} rank(s)" in seen[0]
        return
    assert [[len(batch) for batch in batches] for batches in seen] == [[BATCH_SIZE] * num_batches] * num_ranks
    indices = [index for batches in seen for batch in batches for index in batch]
    assert len(set(indices)) == len(indices) == num_batches * BATCH_SIZE * num_ranks


def test_four_ranks_end_a_run_on_a_few_images_with_the_same_weights_and_statistics(
    digits: Path, ranks: dict[int, list[dict[str, Any]]]
) -> None:
    first, *others = (rank["end"] for rank in ranks[4])
    for other in others:
        assert distance(first, other) == 0
    (row,) = [row for row in logged(digits / "small") if "val/loss" in row]
    assert row["step"] == 1
    result = nets.result(digits / "small")
    # The figures of the epoch are those of the network that is exported: every rank has measured the same one.
    assert row["val/loss"] == pytest.approx(result["val"]["loss"], rel=1e-6)


def test_two_ranks_by_32_learn_what_one_learns_by_64_even_from_a_last_batch_that_they_share_unevenly(
    digits: Path, ranks: dict[int, list[dict[str, Any]]]
) -> None:
    whole = run(
        digits,
        "whole",
        data__train=nets.split(digits, "odd67", nets.TRAIN) | {"last_batch": "keep"},
        data__batch_size=64,
    ).folder
    # Sums of up to 64 float32 gradients in another order: units in the last place of weights below 1. The mean of
    # the ranks' means would be off by 1e-3 and more.
    assert distance(weights(whole), weights(digits / "halves")) < 1e-6
    for ours, theirs in zip(logged(whole), logged(digits / "halves"), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for name in {"train/loss", "train/task", "train/distill", "train/top1", "val/loss"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_batchnorm_of_several_processes_of_a_cpu_cannot_be_synchronized_and_is_refused(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(digits, "sync alone", train__sync_batchnorm=True, train__epochs=1, train__limit_train_batches=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"train\.sync_batchnorm: torch synchronizes BatchNorm on GPUs only"):
        run(digits, "sync", train__sync_batchnorm=True)
