"""`is_uniform`: images of a single color."""

import pytest
import torch

from kd_pipeline.data import uniform
from kd_pipeline.data.uniform import UniformCounter, counted, is_uniform
from tests.on_gpu import OnGpu


def test_one_color_per_image() -> None:
    images = torch.rand(1, 3, 1, 1).expand(4, 3, 17, 19).clone()
    images[1, 2, 16, 18] += 1  # between the pixels that are looked at first
    images[2, 0, 8, 8] += 1
    images[3] = torch.rand(3, 17, 19)
    assert is_uniform(images).tolist() == [True, False, False, False]


def test_nan_is_not_a_color() -> None:
    assert not is_uniform(torch.full((1, 3, 8, 8), float("nan"))).any()


def test_no_images() -> None:
    assert is_uniform(torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_counting_never_waits_for_a_gpu() -> None:
    counter = UniformCounter()
    with OnGpu() as gpu:
        images, valid = gpu.tensor(torch.rand(4, 3, 17, 19)), gpu.tensor(torch.ones(4).bool())
        for _ in range(2 * uniform._MAX_KEPT):
            counter.add(counted(is_uniform(images), valid))
    assert counter._counts is not None and not gpu.copies


def test_counter_counts_valid_images() -> None:
    counter = UniformCounter()
    assert counter.read() == (0, 0)
    images = torch.rand(4, 3, 70, 90)
    images[1:] = 0.5
    images[3, 2, 69, 89] = 0.25
    for _ in range(2):
        counter.add(counted(is_uniform(images), torch.tensor([True, True, False, True])))
    assert counter.read() == (2, 6)


class Event:
    """A CUDA event that is done when a test says so, or when it is waited for."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


ALL_UNIFORM = torch.ones(2, 4, dtype=torch.bool)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """One for each epoch that has ended, as on a GPU."""
    made: list[Event] = []

    def copy(counts: torch.Tensor) -> tuple[torch.Tensor, Event]:
        made.append(Event())
        return counts, made[-1]

    monkeypatch.setattr(uniform, "_copy_to_host", copy)
    return made


def test_epoch_is_reported_once_the_device_is_done(events: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    counter = UniformCounter()
    for epoch in range(2):
        counter.restart()
        counter.add(ALL_UNIFORM)
        counter.end(epoch)
    counter.restart()
    counter.add(ALL_UNIFORM)
    assert caplog.messages == [] and not any(event.is_done for event in events)
    events[0].is_done = True
    counter.add(ALL_UNIFORM)
    (message,) = caplog.messages
    assert message.startswith("4 of 4 images of epoch 1 had a single color")
    counter.report(wait=True)
    counter.end(2)
    assert len(caplog.messages) == 1 and len(events) == 2


@pytest.mark.parametrize("ask", [lambda counter: counter.report(wait=True), UniformCounter.read], ids=["wait", "read"])
def test_who_asks_waits_for_the_report(ask, events: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    counter = UniformCounter()
    counter.add(ALL_UNIFORM)
    counter.end(0)
    assert caplog.messages == []
    ask(counter)
    assert len(caplog.messages) == 1 and events[0].is_done
