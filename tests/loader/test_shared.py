"""A loader that several students share: each sees the batches of a loader of its own, and they are read once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import DataError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.shared import LoaderView, SharedLoader, Wanted, choose
from tests.streams import TRAIN, assert_same, conv_teacher, fields

PER_EPOCH = 5
"""Batches of 8 out of 37 photographs."""


@pytest.fixture(scope="module")
def open_loader(photo_folder) -> Callable[..., KDDataLoader]:
    source, teacher = ImageFolder(photo_folder), conv_teacher()
    return lambda **options: KDDataLoader(source, TRAIN, teacher, **{"batch_size": 8, "seed": 5, **options})


@pytest.fixture(scope="module")
def epochs(open_loader) -> list[list[Any]]:
    with open_loader() as loader:
        return [[fields(batch) for batch in loader] for _ in range(2)]


@pytest.fixture
def shared(open_loader) -> Iterator[SharedLoader]:
    with open_loader() as loader:
        yield SharedLoader(loader, is_training=True)


def take(wanted: Wanted) -> KDBatch:
    return wanted.loader.read(wanted.epoch, wanted.number)


def test_view_is_a_loader_of_its_own(shared: SharedLoader, epochs: list[list[Any]]) -> None:
    view = LoaderView(shared, take)
    assert (len(view), view.batch_size, view.epoch) == (PER_EPOCH, 8, 0)
    for epoch in range(2):
        view.batch_sampler.sampler.set_epoch(epoch)
        assert_same([fields(batch) for batch in view], epochs[epoch])
    assert view.epoch == 2


def test_batch_is_read_once(shared: SharedLoader) -> None:
    views = [LoaderView(shared, take) for _ in range(3)]
    for batches in zip(*views, strict=True):
        assert all(batch is batches[0] for batch in batches)
    assert shared.loader.num_returned == PER_EPOCH


def test_positions_are_those_of_the_students(shared: SharedLoader, open_loader, epochs: list[list[Any]]) -> None:
    ahead, behind = (LoaderView(shared, take) for _ in range(2))
    batches = iter(ahead), iter(behind)
    for _ in range(2):
        next(batches[0])
    next(batches[1])
    states = [view.state_dict() for view in (ahead, behind)]
    assert [(state["epoch"], state["batch"]) for state in states] == [(0, 2), (0, 1)]
    for state in states:  # they are those of any loader
        with open_loader() as loader:
            loader.load_state_dict(state)
            assert_same([fields(batch) for batch in loader], epochs[0][state["batch"] :])


def test_resumed_students_get_the_rest(open_loader, epochs: list[list[Any]]) -> None:
    for first, second in ((1, 3), (3, 1), (0, 4)):
        with open_loader() as loader:
            shared = SharedLoader(loader, is_training=True)
            start = shared.loader.state_dict()
            views = [LoaderView(shared, take) for _ in range(2)]
            for view, number in zip(views, (first, second), strict=True):
                view.load_state_dict({**start, "batch": number})
            for view, number in zip(views, (first, second), strict=True):
                assert_same([fields(batch) for batch in view], epochs[0][number:])


def test_student_that_changes_a_batch_changes_its_own_only(shared: SharedLoader, epochs: list[list[Any]]) -> None:
    views = [LoaderView(shared, take) for _ in range(2)]
    found = []
    for number in range(PER_EPOCH):
        if number == 0:
            loops = [iter(view) for view in views]
        next(loops[0]).images.zero_()
        found.append(fields(next(loops[1])))
    assert_same(found, epochs[0])


def test_failure_is_that_of_all(shared: SharedLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> object:
        raise DataError("cannot be read")

    monkeypatch.setattr("kd_pipeline.loader.prepare.Preparation.prepare", fail)
    errors = []
    for _ in range(2):
        with pytest.raises(DataError, match="cannot be read") as caught:
            shared.read(0, 0)
        errors.append(caught.value)
    assert errors[0] is errors[1]


def test_order_of_reading(shared: SharedLoader, open_loader) -> None:
    with open_loader() as loader, open_loader() as other:
        val, hard = SharedLoader(loader, is_training=False), SharedLoader(other, is_training=False)
        training = {"a": Wanted(shared, 1, 2), "b": Wanted(shared, 0, 4), "c": Wanted(shared, 0, 4)}
        assert choose(training) == (Wanted(shared, 0, 4), ["b", "c"])
        # Validation first, and a loop that is under way before one that starts.
        assert choose({**training, "a": Wanted(val, 0, 0)}) == (Wanted(val, 0, 0), ["a"])
        assert choose({"a": Wanted(val, 0, 0), "b": Wanted(val, 0, 3), "c": Wanted(hard, 0, 0)})[1] == ["b"]
        # Random validation images differ from loop to loop.
        assert choose({"a": Wanted(val, 0, 0), "b": Wanted(val, 1, 0), "c": Wanted(val, 0, 0)})[1] == ["a", "c"]
