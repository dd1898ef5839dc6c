"""A resumed run is the uninterrupted one, however its loops end."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import pytest

from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.loader import KDDataLoader
from tests.streams import TRAIN, Fields, assert_same, conv_teacher, fields, run

NUM_EPOCHS = 3
PER_EPOCH = 5
"""Batches of 8 out of 37 photographs."""

Session = Callable[[KDDataLoader, Callable[[Any], None]], None]


@pytest.fixture(scope="module")
def open_loader(photo_folder) -> Callable[..., KDDataLoader]:
    source, teacher = ImageFolder(photo_folder), conv_teacher()
    return lambda **options: KDDataLoader(source, TRAIN, teacher, **{"batch_size": 8, "seed": 5, **options})


@pytest.fixture(scope="module")
def epochs(open_loader) -> list[list[Fields]]:
    with open_loader() as loader:
        return [[fields(batch) for batch in loader] for _ in range(NUM_EPOCHS + 1)]


# Sessions call `seen` with each batch within the loop, and with None between loops; each is run again after a resume.


def whole_epochs(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
    for _ in range(loader.epoch, NUM_EPOCHS):
        for batch in loader:
            seen(batch)
        seen(None)


def breaks(limit: int) -> Session:
    def session(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
        for _ in range(loader.epoch, NUM_EPOCHS):
            if loader.num_returned < limit:
                for batch in loader:
                    seen(batch)
                    if loader.num_returned == limit:
                        break
            else:
                loader.set_epoch(loader.epoch + 1)
            seen(None)

    return session


def returns_from_a_generator(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
    def progress() -> Iterator[Any]:
        try:
            yield from loader
        finally:
            pass

    def one_epoch() -> None:
        for _, batch in enumerate(progress()):
            seen(batch)
            if loader.num_returned == 3:
                return

    for _ in range(loader.epoch, NUM_EPOCHS):
        if loader.num_returned == 3:
            loader.set_epoch(loader.epoch + 1)
        else:
            one_epoch()
        seen(None)


def peeks_by_hand(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
    next(iter(loader))
    whole_epochs(loader, seen)


def peeks(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
    loader.peek()
    whole_epochs(loader, seen)


def keeps_its_peek(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
    batches = iter(loader)
    next(batches)
    for epoch in range(loader.epoch, NUM_EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            seen(batch)
        seen(None)


def uses_one_iterator(loader: KDDataLoader, seen: Callable[[Any], None]) -> None:
    for epoch in range(loader.epoch, NUM_EPOCHS):
        loader.set_epoch(epoch)
        batches = iter(loader)
        while loader.epoch == epoch and loader.num_returned < 4:
            seen(next(batches))
        loader.set_epoch(epoch + 1)
        seen(None)


SESSIONS = {
    "whole": whole_epochs,
    "break after 1": breaks(1),
    "break after 3": breaks(3),
    "return": returns_from_a_generator,
    "peek by hand": peeks_by_hand,
    "peek": peeks,
    "kept peek": keeps_its_peek,
    "iterator": uses_one_iterator,
}


def recorded(
    loader: KDDataLoader, session: Session, wanted_calls: int | None = None
) -> tuple[list[Fields], list[tuple[int, dict[str, Any]]]]:
    """Batches of a session, and after each step how many there were, with the state."""
    batches: list[Fields] = []
    states: list[tuple[int, dict[str, Any]]] = []

    def seen(batch: Any) -> None:
        if batch is not None:
            batches.append(fields(batch))
        states.append((len(batches), json.loads(json.dumps(loader.state_dict()))))

    session(loader, seen)
    return batches, states


@pytest.mark.slow
@pytest.mark.parametrize("name", SESSIONS)
def test_resumed_at_any_step_equals_uninterrupted(open_loader, name):
    session = SESSIONS[name]
    with open_loader() as loader:
        wanted, states = recorded(loader, session)
    assert len(wanted) >= NUM_EPOCHS and len(states) == len(wanted) + NUM_EPOCHS
    for num_done, state in states:
        with open_loader(ahead=num_done % 2) as loader:
            loader.load_state_dict(state)
            found, _ = recorded(loader, session)
        assert_same(found, wanted[num_done:])


@pytest.mark.parametrize("limit", [1, 3])
def test_loop_left_early_has_ended_its_epoch(open_loader, epochs, limit):
    with open_loader() as loader:
        for epoch in range(NUM_EPOCHS):
            for number, batch in enumerate(loader, start=1):
                assert_same([fields(batch)], [epochs[epoch][number - 1]])
                if number == limit:
                    break
            assert loader.epoch == epoch + 1
            assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (epoch + 1, 0)


def islice_in_one_call(loader: KDDataLoader) -> None:
    list(islice(loader, 2))


def islice_in_a_loop(loader: KDDataLoader) -> None:
    for _ in islice(loader, 2):
        pass


def zip_in_a_loop(loader: KDDataLoader) -> None:
    for _ in zip(range(2), loader, strict=False):
        pass


def dropped_by_name(loader: KDDataLoader) -> None:
    batches = iter(loader)
    next(batches), next(batches)
    del batches


def dropped_on_return(loader: KDDataLoader) -> None:
    batches = iter(loader)
    for batch in batches:
        assert len(batch)
        return


@pytest.mark.parametrize(
    "leave", [islice_in_one_call, islice_in_a_loop, zip_in_a_loop, dropped_by_name, dropped_on_return]
)
def test_any_way_to_leave_ends_the_epoch(open_loader, epochs, leave):
    with open_loader() as loader:
        leave(loader)
        assert loader.state_dict()["epoch"] == loader.epoch == 1
        assert_same(run(loader, 2), epochs[1])


def plain_loop(loader: KDDataLoader) -> None:
    for _ in loader:
        if loader.num_returned == 2:
            raise KeyboardInterrupt


def in_a_handler(loader: KDDataLoader) -> None:
    for _ in loader:
        try:
            if loader.num_returned == 2:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise


def behind_a_generator(loader: KDDataLoader) -> None:
    for _ in enumerate(batch for batch in loader):
        if loader.num_returned == 2:
            int("no number")


def within_with(loader: KDDataLoader) -> None:
    for _ in loader:
        with suppress(ZeroDivisionError):
            if loader.num_returned == 2:
                raise KeyboardInterrupt


@pytest.mark.parametrize("loop", [plain_loop, in_a_handler, behind_a_generator, within_with])
def test_loop_ended_by_an_exception_is_saved_within_its_epoch(open_loader, epochs, loop):
    with open_loader() as loader:
        try:
            loop(loader)
        except (KeyboardInterrupt, ValueError):
            within = loader.state_dict()
        assert loader.state_dict() == within
        assert (within["epoch"], within["batch"]) == (0, 2)
        assert_same([fields(batch) for batch in loader], epochs[1])  # in this process the next loop is a whole epoch
    with open_loader() as loader:
        loader.load_state_dict(within)
        assert_same(run(loader, 1), epochs[0][2:])


def test_exception_after_a_break_does_not_reopen_the_epoch(open_loader):
    with open_loader() as loader:
        try:
            for _ in loader:
                break
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 0)


def test_saving_after_a_break_says_once_what_it_means(open_loader, caplog):
    with open_loader() as loader, caplog.at_level(logging.WARNING, "kd_pipeline"):
        for _ in range(2):
            for _ in islice(loader, 3):
                loader.state_dict()
            assert not caplog.records or loader.epoch == 2
            loader.state_dict()
    (record,) = caplog.records
    assert "epoch 1 was left after 3 of 5 batches" in record.getMessage() and "start of epoch 2" in record.getMessage()


@pytest.mark.parametrize("start", [0, 3, 7])
@pytest.mark.parametrize("look", [KDDataLoader.peek, lambda loader: next(iter(loader))], ids=["peek", "next(iter)"])
def test_look_moves_nothing(open_loader, epochs, look, start):
    everything = [batch for epoch in epochs for batch in epoch]
    with open_loader() as loader:
        loader.load_state_dict({**loader.state_dict(), "epoch": start // PER_EPOCH, "batch": start % PER_EPOCH})
        state = loader.state_dict()
        for _ in range(2):
            assert_same([fields(look(loader))], [everything[start]])
        assert loader.state_dict() == state
        assert_same(run(loader), everything[start : NUM_EPOCHS * PER_EPOCH])


def test_training_on_looks_is_a_warning(open_loader, caplog):
    with open_loader() as loader, caplog.at_level(logging.WARNING, "kd_pipeline"):
        for _ in range(2):
            next(iter(loader))
        list(loader)
        for _ in range(2):
            batches = iter(loader)
            next(batches)
            del batches
        assert not caplog.records
        next(iter(loader))
    assert "the same batch 3 times" in caplog.text


def test_peek_is_a_copy(open_loader, epochs):
    with open_loader() as loader:
        loader.peek().images.zero_()
        assert_same(run(loader, 1), epochs[0])


def test_peek_within_a_loop_shows_the_next_loop(open_loader, epochs):
    with open_loader(ahead=2) as loader:
        found = []
        for batch in loader:
            found.append(fields(batch))
            if len(found) == 2:
                assert_same([fields(loader.peek())], epochs[1][:1])
        assert_same(found + run(loader, 2), epochs[0] + epochs[1])


def test_peek_of_a_closed_loader_is_refused(open_loader):
    loader = open_loader()
    loader.close()
    with pytest.raises(StateError, match="closed"):
        loader.peek()


@pytest.mark.parametrize("epoch", [-1, 1.5, "2", None, True])
def test_what_is_no_epoch_is_refused(open_loader, epochs, epoch):
    with open_loader() as loader:
        with pytest.raises(ConfigError, match="epoch must be"):
            loader.set_epoch(epoch)
        assert_same([fields(batch) for batch in loader], epochs[0])


def test_set_epoch_runs_the_epoch_again(open_loader, epochs):
    with open_loader() as loader:
        for _ in range(2):
            loader.set_epoch(1)
            assert_same([fields(batch) for batch in islice(loader, 3)], epochs[1][:3])
        loader.set_epoch(0)
        assert_same([fields(batch) for batch in loader], epochs[0])
        loader.set_epoch(1)
        assert_same([fields(batch) for batch in loader], epochs[1])


def test_num_returned_counts_from_the_start_of_the_epoch(open_loader):
    with open_loader() as loader:
        assert loader.num_returned == 0
        assert [loader.num_returned for _ in loader] == [1, 2, 3, 4, 5]
        assert loader.num_returned == 0
        loader.load_state_dict({**loader.state_dict(), "batch": 3})
        assert loader.num_returned == 3
        assert [loader.num_returned for _ in loader] == [4, 5]
