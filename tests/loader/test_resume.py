"""A stopped run goes on with the very next batch, in a new loader, on other ranks, and inside Lightning."""

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
from kd_pipeline.data.sources.base import ImageFolder
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
class Recording:
    """Three epochs without a stop."""

    batches: list[Fields]
    states: list[dict[str, Any]]
    """`states[n]` was taken in the loop, while batch n - 1 was in use."""
    between: dict[int, dict[str, Any]]
    """`between[n]` was taken after a loop had ended with batch n - 1."""


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
def recording(open_loader) -> Recording:
    with open_loader() as loader:
        found = Recording([], [loader.state_dict()], {0: loader.state_dict()})
        for _ in range(NUM_EPOCHS):
            for batch in loader:
                found.batches.append(fields(batch))
                found.states.append(loader.state_dict())
            found.between[len(found.batches)] = loader.state_dict()
    assert len(found.batches) == NUM_BATCHES
    return found


# One process


@pytest.mark.parametrize("stop", range(NUM_BATCHES + 1))
def test_a_new_loader_goes_on_with_the_very_next_batch(open_loader, recording, stop):
    options = {"num_threads": 1 + stop % 2, "prefetch": 1 + stop % 3, "ahead": (0, 1, 3)[stop % 3]}
    with open_loader(**options) as loader:
        loader.load_state_dict(json.loads(json.dumps(recording.states[stop])))
        assert_same(run(loader, NUM_EPOCHS), recording.batches[stop:])
        assert loader.epoch == NUM_EPOCHS


@pytest.mark.parametrize("stop", [0, 5, 10, 15])
def test_a_new_loader_goes_on_with_the_next_epoch_after_a_whole_one(open_loader, recording, stop):
    with open_loader() as loader:
        loader.load_state_dict(recording.between[stop])
        assert loader.epoch == stop // PER_EPOCH
        assert_same(run(loader, NUM_EPOCHS), recording.batches[stop:])


@pytest.mark.parametrize(("ahead", "prefetch"), [(0, 4), (1, 1), (3, 2)])
def test_threads_prefetch_and_ahead_change_nothing(open_loader, recording, ahead, prefetch):
    with open_loader(ahead=ahead, prefetch=prefetch, num_threads=3) as loader:
        states = [loader.state_dict()]
        for number, batch in enumerate(loader):
            assert_same([fields(batch)], [recording.batches[number]])
            states.append(loader.state_dict())
    assert states == recording.states[: PER_EPOCH + 1]


def test_an_epoch_can_be_interrupted_again_and_again(open_loader, recording):
    seen: list[Fields] = []
    state = recording.states[0]
    for _ in range(NUM_BATCHES):
        with open_loader() as loader:
            loader.load_state_dict(state)
            if loader.epoch == NUM_EPOCHS:
                break
            seen += [fields(batch) for batch in islice(loader, 2)]
            state = loader.state_dict()
    assert_same(seen, recording.batches)


def test_leaving_a_loop_at_its_last_batch_ends_the_epoch(open_loader, recording):
    with open_loader() as loader:
        for number, _ in enumerate(loader, start=1):
            if number == len(loader):
                break
        state = loader.state_dict()
        assert_same([fields(batch) for batch in loader], recording.batches[PER_EPOCH : 2 * PER_EPOCH])
    with open_loader() as loader:
        loader.load_state_dict(state)
        assert loader.epoch == 1
        assert_same(run(loader, 2), recording.batches[PER_EPOCH : 2 * PER_EPOCH])


def test_loops_that_take_just_as_many_batches_as_there_are_give_whole_epochs(open_loader, recording):
    with open_loader() as loader:
        seen = [[fields(batch) for batch in islice(loader, len(loader))] for _ in range(NUM_EPOCHS)]
    assert [len(epoch) for epoch in seen] == [PER_EPOCH] * NUM_EPOCHS
    assert_same([batch for epoch in seen for batch in epoch], recording.batches)


def test_a_loop_after_one_that_was_left_early_is_the_next_epoch(open_loader, recording):
    with open_loader() as loader:
        assert_same([fields(batch) for batch in islice(loader, 2)], recording.batches[:2])
        assert_same([fields(batch) for batch in loader], recording.batches[PER_EPOCH : 2 * PER_EPOCH])


# The state


@pytest.mark.parametrize("stop", range(NUM_BATCHES + 1))
def test_a_state_that_is_loaded_and_saved_again_is_the_same(open_loader, recording, stop):
    with open_loader() as loader:
        loader.load_state_dict(recording.states[stop])
        assert loader.state_dict() == recording.states[stop]


def test_a_state_is_the_same_after_json(recording):
    for state in [*recording.states, *recording.between.values()]:
        assert json.loads(json.dumps(state)) == state


def test_a_state_is_the_same_after_a_checkpoint_that_holds_no_code(recording):
    for state in recording.states:
        file = io.BytesIO()
        torch.save({"loader": state}, file)
        file.seek(0)
        assert torch.load(file, weights_only=True) == {"loader": state}


def test_a_state_does_not_change_when_the_loader_goes_on(open_loader):
    with open_loader() as loader:
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
        before = json.dumps(state)
        list(iterator)
        assert json.dumps(state) == before


def test_loading_in_mid_loop_moves_the_loader_and_the_old_loop_says_so(open_loader, recording):
    with open_loader(ahead=2) as loader:
        old = iter(loader)
        next(old)
        loader.load_state_dict(recording.states[7])
        with pytest.raises(StateError, match="this loop has lost its place"):
            next(old)
        assert_same(run(loader, NUM_EPOCHS), recording.batches[7:])


def test_a_state_from_a_later_place_goes_back_too(open_loader, recording):
    with open_loader() as loader:
        run(loader, 2)
        loader.load_state_dict(recording.states[3])
        assert loader.epoch == 0
        assert_same(run(loader, 1), recording.batches[3:PER_EPOCH])


def test_a_refused_state_leaves_the_loader_where_it_was(open_loader, recording):
    with open_loader() as loader:
        iterator = iter(loader)
        assert_same([fields(next(iterator))], recording.batches[:1])
        with pytest.raises(StateError):
            loader.load_state_dict({**recording.states[7], "batch": -1})
        assert loader.state_dict() == recording.states[1]
        assert_same([fields(batch) for batch in iterator], recording.batches[1:PER_EPOCH])


# Ranks

WAYS = [(1, 16), (2, 8), (4, 4)]
"""World size and batch size of a rank: all make global batches of 16, of which an epoch has three."""


@pytest.fixture(scope="module")
def ways(open_loader) -> dict[tuple[int, int], list[Recording]]:
    """Two epochs of every rank in each of the ways."""
    found: dict[tuple[int, int], list[Recording]] = {way: [] for way in WAYS}
    for (world_size, batch_size), ranks in found.items():
        for rank in range(world_size):
            with open_loader(batch_size=batch_size, shard=Shard(rank, world_size)) as loader:
                ranks.append(Recording([], [loader.state_dict()], {}))
                for _ in range(2):
                    for batch in loader:
                        ranks[-1].batches.append(fields(batch))
                        ranks[-1].states.append(loader.state_dict())
    return found


def test_all_ranks_of_all_worlds_have_the_same_state(ways):
    states = [rank.states for ranks in ways.values() for rank in ranks]
    assert len(states) == 7 and all(rank == states[0] for rank in states)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize(("old", "new"), [((2, 8), (1, 16)), ((1, 16), (4, 4)), ((4, 4), (2, 8))], ids=str)
def test_a_run_goes_on_in_the_same_order_on_more_or_fewer_ranks(open_loader, ways, old, new, stop):
    world_size, batch_size = new
    found = []
    for rank in range(world_size):
        with open_loader(batch_size=batch_size, shard=Shard(rank, world_size)) as loader:
            loader.load_state_dict(ways[old][-1].states[stop])
            found.append(run(loader, 2))
    assert_same(without_teacher(found), without_teacher([rank.batches[stop:] for rank in ways[old]]))


def without_teacher(ranks: list[list[Fields]]) -> list[Fields]:
    """The global stream; logits may differ in the last bit in a batch of another size."""
    return [{name: row[name] for name in ("index", "images", "labels", "valid")} for row in global_rows(ranks)]


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


# Lightning has advice on workers, loggers and open folders, none of which is about the batches.
quiet = pytest.mark.filterwarnings("ignore:::lightning")


@quiet
def test_lightning_sees_the_batches_of_a_plain_loop(trained, recording):
    assert_same(trained.seen, recording.batches)


@quiet
def test_lightning_validates_on_every_batch_of_another_loader_after_every_epoch(fit, open_loader, recording):
    with open_loader() as loader, open_loader(shuffle=False) as val:
        student = fit(loader, val=val)
    assert_same(student.seen, recording.batches)
    order = [int(index) for batch in student.validated for index in batch["index"]]
    assert order == [*range(37)] * NUM_EPOCHS


@quiet
@pytest.mark.parametrize("step", [1, 4, 5, 7, 10, 14])
def test_lightning_resumes_the_checkpoint_of_a_step_with_the_very_next_batch(fit, open_loader, trained, step):
    with open_loader() as loader:
        student = fit(loader, ckpt_path=trained.folder / f"step={step}.ckpt")
    assert_same(student.seen, trained.seen[step:])


@quiet
@pytest.mark.parametrize("epoch", [0, 1])
def test_lightning_resumes_the_checkpoint_of_an_epoch_with_the_next_epoch(fit, open_loader, trained, epoch):
    with open_loader() as loader:
        student = fit(loader, ckpt_path=trained.folder / f"epoch={epoch}.ckpt")
    assert_same(student.seen, trained.seen[PER_EPOCH * (epoch + 1) :])


def test_a_loop_that_set_epoch_moved_away_from_says_so(open_loader):
    with open_loader() as loader:
        batches = iter(loader)
        next(batches)
        loader.set_epoch(5)
        with pytest.raises(StateError, match="lost its place"):
            next(batches)
