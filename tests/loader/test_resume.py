"""A stopped run continues with the next batch: in a new loader, on different ranks, and in Lightning."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import StateError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher
from tests.streams import (
    TRAIN,
    Fields,
    assert_same,
    conv_teacher,
    fields,
    global_rows,
    run,
)

NUM_EPOCHS = 3
PER_EPOCH = 5
"""Batches of 8 out of 37 photographs."""
NUM_BATCHES = NUM_EPOCHS * PER_EPOCH


@dataclass(frozen=True)
class Uninterrupted:
    """Batches and states of an uninterrupted run."""

    batches: list[Fields]
    states: list[dict[str, Any]]
    """`states[n]` was taken in the loop, after batch n - 1."""
    between: dict[int, dict[str, Any]]
    """`between[n]` was taken after a loop that ended with batch n - 1."""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return conv_teacher()


@pytest.fixture(scope="module")
def open_loader(photo_folder, teacher) -> Callable[..., KDDataLoader]:
    source = ImageFolder(photo_folder)

    def make(**options: Any) -> KDDataLoader:
        return KDDataLoader(source, TRAIN, teacher, **{"batch_size": 8, "seed": 5, **options})

    return make


@pytest.fixture(scope="module")
def whole_run(open_loader) -> Uninterrupted:
    with open_loader() as loader:
        found = Uninterrupted([], [loader.state_dict()], {0: loader.state_dict()})
        for _ in range(NUM_EPOCHS):
            for batch in loader:
                found.batches.append(fields(batch))
                found.states.append(loader.state_dict())
            found.between[len(found.batches)] = loader.state_dict()
    assert len(found.batches) == NUM_BATCHES
    return found


# One process


@pytest.mark.parametrize("stop", range(NUM_BATCHES + 1))
def test_resume_continues_with_next_batch(open_loader, whole_run, stop):
    options = {"num_threads": 1 + stop % 2, "prefetch": 1 + stop % 3, "ahead": (0, 1, 3)[stop % 3]}
    with open_loader(**options) as loader:
        loader.load_state_dict(json.loads(json.dumps(whole_run.states[stop])))
        assert_same(run(loader, NUM_EPOCHS), whole_run.batches[stop:])
        assert loader.epoch == NUM_EPOCHS


@pytest.mark.parametrize("stop", [0, 5, 10, 15])
def test_resume_after_full_epoch(open_loader, whole_run, stop):
    with open_loader() as loader:
        loader.load_state_dict(whole_run.between[stop])
        assert loader.epoch == stop // PER_EPOCH
        assert_same(run(loader, NUM_EPOCHS), whole_run.batches[stop:])


@pytest.mark.parametrize(("ahead", "prefetch"), [(0, 4), (1, 1), (3, 2)])
def test_threads_prefetch_and_ahead_change_nothing(open_loader, whole_run, ahead, prefetch):
    with open_loader(ahead=ahead, prefetch=prefetch, num_threads=3) as loader:
        states = [loader.state_dict()]
        for number, batch in enumerate(loader):
            assert_same([fields(batch)], [whole_run.batches[number]])
            states.append(loader.state_dict())
    assert states == whole_run.states[: PER_EPOCH + 1]


def test_repeated_interruptions_of_an_epoch(open_loader, whole_run):
    seen: list[Fields] = []
    state = whole_run.states[0]
    for _ in range(NUM_BATCHES):
        with open_loader() as loader:
            loader.load_state_dict(state)
            if loader.epoch == NUM_EPOCHS:
                break
            for batch in islice(loader, 2):
                seen.append(fields(batch))
                state = loader.state_dict()
    assert_same(seen, whole_run.batches)


def test_break_at_last_batch_ends_epoch(open_loader, whole_run):
    with open_loader() as loader:
        for number, _ in enumerate(loader, start=1):
            if number == len(loader):
                break
        state = loader.state_dict()
        assert_same([fields(batch) for batch in loader], whole_run.batches[PER_EPOCH : 2 * PER_EPOCH])
    with open_loader() as loader:
        loader.load_state_dict(state)
        assert loader.epoch == 1
        assert_same(run(loader, 2), whole_run.batches[PER_EPOCH : 2 * PER_EPOCH])


def test_islice_of_full_length_is_one_epoch(open_loader, whole_run):
    with open_loader() as loader:
        seen = [[fields(batch) for batch in islice(loader, len(loader))] for _ in range(NUM_EPOCHS)]
    assert [len(epoch) for epoch in seen] == [PER_EPOCH] * NUM_EPOCHS
    assert_same([batch for epoch in seen for batch in epoch], whole_run.batches)


def test_loop_after_break_is_next_epoch(open_loader, whole_run):
    with open_loader() as loader:
        assert_same([fields(batch) for batch in islice(loader, 2)], whole_run.batches[:2])
        assert_same([fields(batch) for batch in loader], whole_run.batches[PER_EPOCH : 2 * PER_EPOCH])


# The state


@pytest.mark.parametrize("stop", range(NUM_BATCHES + 1))
def test_loaded_state_is_saved_unchanged(open_loader, whole_run, stop):
    with open_loader() as loader:
        loader.load_state_dict(whole_run.states[stop])
        assert loader.state_dict() == whole_run.states[stop]


def test_state_survives_json(whole_run):
    for state in [*whole_run.states, *whole_run.between.values()]:
        assert json.loads(json.dumps(state)) == state


def test_state_survives_weights_only_checkpoint(whole_run):
    for state in whole_run.states:
        file = io.BytesIO()
        torch.save({"loader": state}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True) == {"loader": state}


def test_state_is_a_snapshot(open_loader):
    with open_loader() as loader:
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
        before = json.dumps(state)
        list(iterator)
        assert json.dumps(state) == before


def test_loading_within_loop_ends_old_loop(open_loader, whole_run):
    with open_loader(ahead=2) as loader:
        old = iter(loader)
        next(old)
        loader.load_state_dict(whole_run.states[7])
        with pytest.raises(StateError, match="this loop has lost its place"):
            next(old)
        assert_same(run(loader, NUM_EPOCHS), whole_run.batches[7:])


def test_loading_goes_back(open_loader, whole_run):
    with open_loader() as loader:
        run(loader, 2)
        loader.load_state_dict(whole_run.states[3])
        assert loader.epoch == 0
        assert_same(run(loader, 1), whole_run.batches[3:PER_EPOCH])


def test_refused_state_changes_nothing(open_loader, whole_run):
    with open_loader() as loader:
        iterator = iter(loader)
        assert_same([fields(next(iterator))], whole_run.batches[:1])
        with pytest.raises(StateError):
            loader.load_state_dict({**whole_run.states[7], "batch": -1})
        assert loader.state_dict() == whole_run.states[1]
        assert_same([fields(batch) for batch in iterator], whole_run.batches[1:PER_EPOCH])


# Ranks

SPLITS = [(1, 16), (2, 8), (4, 4)]
"""World size and batch size per rank: all have global batches of 16, three in an epoch."""


@pytest.fixture(scope="module")
def runs_by_split(open_loader) -> dict[tuple[int, int], list[Uninterrupted]]:
    """Two epochs of every rank, by world size and batch size."""
    found: dict[tuple[int, int], list[Uninterrupted]] = {split: [] for split in SPLITS}
    for (world_size, batch_size), ranks in found.items():
        for rank in range(world_size):
            with open_loader(batch_size=batch_size, shard=Shard(rank, world_size)) as loader:
                ranks.append(Uninterrupted([], [loader.state_dict()], {}))
                for _ in range(2):
                    for batch in loader:
                        ranks[-1].batches.append(fields(batch))
                        ranks[-1].states.append(loader.state_dict())
    return found


def test_state_is_equal_on_all_ranks(runs_by_split):
    states = [rank.states for ranks in runs_by_split.values() for rank in ranks]
    assert len(states) == 7 and all(rank == states[0] for rank in states)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize(("old", "new"), [((2, 8), (1, 16)), ((1, 16), (4, 4)), ((4, 4), (2, 8))], ids=str)
def test_resume_on_more_or_fewer_ranks(open_loader, runs_by_split, old, new, stop):
    world_size, batch_size = new
    found = []
    for rank in range(world_size):
        with open_loader(batch_size=batch_size, shard=Shard(rank, world_size)) as loader:
            loader.load_state_dict(runs_by_split[old][-1].states[stop])
            found.append(run(loader, 2))
    assert_same(without_teacher(found), without_teacher([rank.batches[stop:] for rank in runs_by_split[old]]))


def without_teacher(ranks: list[list[Fields]]) -> list[Fields]:
    """The global stream without padding; logits may differ in the last bit in a batch of a different size."""
    names = "index", "images", "labels"
    return [{name: row[name] for name in names} for row in global_rows(ranks) if row["valid"]]


# Lightning


@dataclass(frozen=True)
class Lightning:
    """One uninterrupted training."""

    seen: list[Fields]
    folder: Path
    """Holds `step=<n>.ckpt` for every step and `epoch=<n>.ckpt` for every epoch."""


@pytest.fixture(scope="module")
def fit(tmp_path_factory) -> Callable[..., Any]:
    """`fit(loader)` trains for three epochs with Lightning; the student it returns has `seen` and `validated`."""
    lightning = pytest.importorskip("lightning")

    class Student(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 10)
            self.seen: list[Fields] = []
            self.validated: list[Fields] = []

        def training_step(self, batch, number: int):
            self.seen.append(fields(batch))
            logits = self.head(batch.images.mean((2, 3)))
            loss = torch.nn.functional.mse_loss(logits, batch.teacher["logits"])
            self.log("loss", loss, on_epoch=True)
            return loss

        def validation_step(self, batch, number: int):
            if not self.trainer.sanity_checking:
                self.validated.append(fields(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def run_trainer(
        loader: KDDataLoader, *callbacks: Any, val: KDDataLoader | None = None, ckpt_path: Path | None = None
    ) -> Student:
        student = Student()
        trainer = lightning.Trainer(
            max_epochs=NUM_EPOCHS,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path_factory.mktemp("lightning"),
        )
        trainer.fit(student, loader, val, ckpt_path=ckpt_path)
        return student

    return run_trainer


@pytest.fixture(scope="module")
def trained(fit, open_loader, tmp_path_factory) -> Lightning:
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    every_epoch = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    with open_loader() as loader:
        return Lightning(fit(loader, every_step, every_epoch).seen, folder)


# Lightning warns about workers, loggers and existing folders.
quiet = pytest.mark.filterwarnings("ignore:::lightning")


@quiet
def test_lightning_sees_batches_of_plain_loop(trained, whole_run):
    assert_same(trained.seen, whole_run.batches)


@quiet
def test_lightning_validates_on_every_batch(fit, open_loader, whole_run):
    with open_loader() as loader, open_loader(shuffle=False) as val:
        student = fit(loader, val=val)
    assert_same(student.seen, whole_run.batches)
    order = [int(index) for batch in student.validated for index in batch["index"]]
    assert order == [*range(37)] * NUM_EPOCHS


@quiet
@pytest.mark.parametrize("step", [1, 4, 5, 7, 10, 14])
def test_lightning_resumes_step_checkpoint(fit, open_loader, trained, step):
    with open_loader() as loader:
        student = fit(loader, ckpt_path=trained.folder / f"step={step}.ckpt")
    assert_same(student.seen, trained.seen[step:])


@quiet
@pytest.mark.parametrize("epoch", [0, 1])
def test_lightning_resumes_epoch_checkpoint(fit, open_loader, trained, epoch):
    with open_loader() as loader:
        student = fit(loader, ckpt_path=trained.folder / f"epoch={epoch}.ckpt")
    assert_same(student.seen, trained.seen[PER_EPOCH * (epoch + 1) :])


def test_set_epoch_within_loop_ends_old_loop(open_loader):
    with open_loader() as loader:
        batches = iter(loader)
        next(batches)
        loader.set_epoch(5)
        with pytest.raises(StateError, match="lost its place"):
            next(batches)
