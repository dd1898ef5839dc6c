"""The order of synchronization calls on a GPU, with fakes of `torch.cuda` that record them."""

from contextlib import contextmanager

import pytest
import torch

from kd_pipeline.loader.streams import StreamSync, open_stream_sync
from tests.on_gpu import OnGpu

REAL_STREAM, REAL_EVENT = torch.cuda.Stream, torch.cuda.Event
DEVICE, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class Event:
    """Done when the test sets `is_done`, or after `synchronize`."""

    def __init__(self, name, calls):
        self.name, self.is_done, self._calls = name, False, calls

    def query(self):
        return self.is_done

    def synchronize(self):
        self._calls.append(f"the host waits for {self.name}")
        self.is_done = True


class Stream:
    def __init__(self, name, calls):
        self.name, self.events, self._calls = name, [], calls

    def record_event(self):
        self.events.append(Event(f"event {len(self.events)} on the {self.name}'s stream", self._calls))
        self._calls.append(f"record {self.events[-1].name}")
        return self.events[-1]

    def wait_stream(self, other):
        self._calls.append(f"the {self.name}'s stream waits for the {other.name}'s stream")

    def wait_event(self, event):
        self._calls.append(f"the {self.name}'s stream waits for {event.name}")

    def synchronize(self):
        self._calls.append(f"the host waits for the {self.name}'s stream")


class Tensor:
    def __init__(self, calls, *, is_cuda=True, is_pinned=False, device=DEVICE):
        self._calls, self.is_cuda, self._is_pinned, self.device = calls, is_cuda, is_pinned, device

    def record_stream(self, stream):
        assert self.is_cuda, "torch raises NotImplementedError for a tensor on the CPU"
        self._calls.append(f"record_stream for the {stream.name}'s stream")

    def pin_memory(self):
        assert not self.is_cuda, "torch pins only tensors on the CPU"
        if self._is_pinned:
            return self
        self._calls.append("copy to pinned memory")
        return Tensor(self._calls, is_cuda=False, is_pinned=True)

    def to(self, device, *, non_blocking=False):
        kind = "GPU" if self.is_cuda else "pinned" if self._is_pinned else "pageable"
        self._calls.append(f"copy from {kind} memory to {device}, {non_blocking=}")
        return Tensor(self._calls)


class Buffer:
    """Records when it is freed."""

    def __init__(self, name, dropped):
        self._name, self._dropped = name, dropped

    def __del__(self):
        self._dropped.append(self._name)


class Recorder:
    """Replaces `torch.cuda` and records all calls in order."""

    def __init__(self):
        self.calls = []
        self.consumer = self.current = Stream("consumer", self.calls)
        self.of_other = Stream("other GPU", self.calls)
        self.made = []

    def make_stream(self, device):
        assert device == DEVICE
        self.made.append(Stream("teacher", self.calls))
        return self.made[-1]

    def current_stream(self, device):
        assert device in (DEVICE, OTHER)
        return self.current if device == DEVICE else self.of_other

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", recorder.make_stream)
    monkeypatch.setattr(torch.cuda, "stream", recorder.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", recorder.current_stream)
    return recorder


def test_fakes_have_only_real_methods():
    methods = {REAL_STREAM: Stream, REAL_EVENT: Event, torch.Tensor: Tensor}
    for real, fake in methods.items():
        names = [name for name in vars(fake) if not name.startswith("_")]
        assert names and all(callable(getattr(real, name)) for name in names)
    assert {"is_cuda", "device"} <= {*dir(torch.Tensor)}
    assert callable(torch.cuda.stream) and callable(torch.cuda.current_stream)


def test_teacher_has_its_own_stream(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    assert cuda.made == [sync.stream] and sync.stream is not cuda.consumer
    with sync.on_teacher_stream():
        assert cuda.current is sync.stream
    assert cuda.current is cuda.consumer


def test_teacher_stream_waits_for_its_weights(cuda):
    open_stream_sync(DEVICE, ahead=1)
    assert cuda.calls == ["the teacher's stream waits for the consumer's stream"]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_number_of_kept_buffers_is_bounded(cuda, ahead):
    sync, dropped, max_kept = open_stream_sync(DEVICE, ahead=ahead), [], 2 * (ahead + 2)
    cuda.calls.clear()
    for number in range(max_kept):
        sync.keep_until_used(Buffer(number, dropped))
    assert dropped == [] and not any("host" in call for call in cuda.calls)
    for number in range(max_kept, 50):
        sync.keep_until_used(Buffer(number, dropped))
    assert dropped == list(range(50 - max_kept))
    waits = [call for call in cuda.calls if "host" in call]
    assert waits == [f"the host waits for event {number} on the consumer's stream" for number in dropped]


def test_event_is_on_teacher_stream(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    with sync.on_teacher_stream():
        event = sync.record_event()
    assert sync.stream.events == [event] and cuda.consumer.events == []


def test_consumer_stream_waits_and_host_does_not(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    event = sync.record_event()
    cuda.calls.clear()
    sync.hand_over(event, [])
    assert cuda.calls == ["the consumer's stream waits for event 0 on the teacher's stream"]
    sync.keep_until_used(object())
    assert not any("host" in call for call in cuda.calls)


def test_torch_tensors_are_recorded_on_consumer_stream(cuda):
    """Memory allocated on the teacher's stream must not be reused before the consumer is done."""
    sync = open_stream_sync(DEVICE, ahead=1)
    event = sync.record_event()
    cuda.calls.clear()
    sync.hand_over(event, [Tensor(cuda.calls), Tensor(cuda.calls)])
    assert cuda.calls[0].startswith("the consumer's stream waits")
    assert cuda.calls[1:] == ["record_stream for the consumer's stream"] * 2


def test_tensors_on_the_cpu_are_handed_over_as_they_are(cuda):
    """A list of tensors beside the batch stays where the user's loader put it."""
    sync = open_stream_sync(DEVICE, ahead=1)
    sync.hand_over(sync.record_event(), [Tensor(cuda.calls, is_cuda=False)])
    assert not any("record_stream" in call for call in cuda.calls)


def test_teacher_waits_for_tensors_on_a_gpu(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    cuda.calls.clear()
    sync.wait_for([Tensor(cuda.calls, is_cuda=False)])
    assert cuda.calls == []
    sync.wait_for([Tensor(cuda.calls), Tensor(cuda.calls, is_cuda=False), Tensor(cuda.calls)])
    assert cuda.calls == [
        "the teacher's stream waits for the consumer's stream",
        *["record_stream for the teacher's stream"] * 2,
    ]
    cuda.calls.clear()
    sync.wait_for([Tensor(cuda.calls, device=OTHER)])
    assert cuda.calls[0] == "the teacher's stream waits for the other GPU's stream"


def test_copies_come_from_pinned_memory(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    cuda.calls.clear()
    sync.to_device(Tensor(cuda.calls, is_cuda=False))
    sync.to_device(Tensor(cuda.calls, is_cuda=False, is_pinned=True))
    sync.to_device(Tensor(cuda.calls))
    assert cuda.calls == [
        "copy to pinned memory",
        *["copy from pinned memory to cuda:0, non_blocking=True"] * 2,
        "copy from GPU memory to cuda:0, non_blocking=True",
    ]


def test_current_stream_of_consumer_waits(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    event = sync.record_event()
    own = Stream("third", cuda.calls)
    cuda.calls.clear()
    with cuda.stream(own):
        sync.hand_over(event, [Tensor(cuda.calls)])
        sync.keep_until_used(object())
    assert cuda.calls == [
        "the third's stream waits for event 0 on the teacher's stream",
        "record_stream for the third's stream",
        "record event 0 on the third's stream",
    ]


def test_buffer_is_kept_until_consumer_passed(cuda):
    sync, dropped = open_stream_sync(DEVICE, ahead=1), []
    for name in "abc":
        sync.keep_until_used(Buffer(name, dropped))
    assert dropped == [] and len(cuda.consumer.events) == 3
    cuda.consumer.events[0].is_done = True
    sync.keep_until_used(Buffer("d", dropped))
    assert dropped == ["a"]
    for event in cuda.consumer.events:
        event.is_done = True
    sync.keep_until_used(Buffer("e", dropped))
    assert dropped == ["a", "b", "c", "d"]


def test_buffer_without_consumer_is_kept_until_its_event(cuda):
    sync, dropped = open_stream_sync(DEVICE, ahead=1), []
    event = sync.record_event()
    sync.keep_until(event, Buffer("a", dropped))
    sync.keep_until_used(Buffer("b", dropped))
    assert dropped == []
    event.is_done = True
    sync.keep_until_used(Buffer("c", dropped))
    assert dropped == ["a"]


def test_buffers_are_dropped_in_order(cuda):
    sync, dropped = open_stream_sync(DEVICE, ahead=1), []
    for name in "abc":
        sync.keep_until_used(Buffer(name, dropped))
    cuda.consumer.events[1].is_done = True
    sync.keep_until_used(Buffer("d", dropped))
    assert dropped == []


def test_close_waits_for_buffers_and_teacher(cuda):
    sync = open_stream_sync(DEVICE, ahead=1)
    for name in "ab":
        sync.keep_until_used(Buffer(name, cuda.calls))
    cuda.calls.clear()
    sync.close()
    waits = [call for call in cuda.calls if "waits" in call]
    assert waits == [
        "the host waits for event 0 on the consumer's stream",
        "the host waits for event 1 on the consumer's stream",
        "the host waits for the teacher's stream",
    ]
    assert cuda.calls.index("a") > cuda.calls.index(waits[0]) and cuda.calls.index("b") > cuda.calls.index(waits[1])
    cuda.calls.clear()
    sync.close()
    assert cuda.calls == waits[2:]


def test_nothing_is_kept_once_it_is_closed(cuda):
    """As by the end of a loop that was open."""
    sync, dropped = open_stream_sync(DEVICE, ahead=1), []
    sync.close()
    sync.keep_until_used(Buffer("a", dropped))
    assert dropped == ["a"] and cuda.calls[-1] == "the host waits for event 0 on the consumer's stream"


def test_cpu_orders_and_keeps_nothing():
    sync, dropped = open_stream_sync(torch.device("cpu"), ahead=1), []
    assert type(sync) is StreamSync and sync.stream is None
    with sync.on_teacher_stream():
        event = sync.record_event()
    sync.hand_over(event, [torch.zeros(1)])
    sync.keep_until_used(Buffer("a", dropped))
    sync.keep_until(event, Buffer("b", dropped))
    assert dropped == ["a", "b"]
    tensor = torch.zeros(1)
    assert sync.to_device(tensor) is tensor
    sync.close()


def test_copies_to_the_cpu_wait():
    """Otherwise the host might read a copy of a GPU's tensor before it is there."""
    with OnGpu() as gpu:
        copy = open_stream_sync(torch.device("cpu"), ahead=0).to_device(gpu.tensor(torch.ones(2)))
    assert copy.device.type == "cpu" and [each.waits for each in gpu.copies] == [True]
