"""The order of the calls that keep DALI, the teacher and the consumer apart on a GPU, on a recorder of such calls."""

from contextlib import contextmanager

import pytest
import torch

from kd_pipeline.loader.streams import CpuLane, CudaLane, open_lane

REAL_STREAM, REAL_EVENT = torch.cuda.Stream, torch.cuda.Event
DEVICE = torch.device("cuda", 0)


class Event:
    """Done when the test says so, or when somebody waits for it."""

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
    def __init__(self, calls):
        self._calls = calls

    def record_stream(self, stream):
        self._calls.append(f"torch is told of the {stream.name}'s stream")


class Buffer:
    """Something that can be seen to be dropped."""

    def __init__(self, name, dropped):
        self._name, self._dropped = name, dropped

    def __del__(self):
        self._dropped.append(self._name)


class Recorder:
    """Stands in for `torch.cuda`: writes down what is called, in order."""

    def __init__(self):
        self.calls = []
        self.consumer = self.current = Stream("consumer", self.calls)
        self.made = []

    def make_stream(self, device):
        assert device == DEVICE
        self.made.append(Stream("teacher", self.calls))
        return self.made[-1]

    def current_stream(self, device):
        assert device == DEVICE
        return self.current

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


def test_the_real_classes_have_every_method_that_is_recorded_here():
    methods = {REAL_STREAM: Stream, REAL_EVENT: Event, torch.Tensor: Tensor}
    for real, fake in methods.items():
        names = [name for name in vars(fake) if not name.startswith("_")]
        assert names and all(callable(getattr(real, name)) for name in names)
    assert callable(torch.cuda.stream) and callable(torch.cuda.current_stream)


def test_teaching_is_queued_on_a_stream_of_its_own_that_dali_gets_too(cuda):
    lane = CudaLane(DEVICE, most_kept=6)
    assert cuda.made == [lane.stream] and lane.stream is not cuda.consumer
    with lane.teaching():
        assert cuda.current is lane.stream
    assert cuda.current is cuda.consumer


def test_the_teachers_stream_waits_for_the_work_that_moved_its_weights(cuda):
    CudaLane(DEVICE, most_kept=6)
    assert cuda.calls == ["the teacher's stream waits for the consumer's stream"]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_consumer_far_behind_keeps_a_bounded_number_of_buffers(cuda, ahead):
    lane, dropped, most_kept = open_lane(DEVICE, ahead=ahead), [], 2 * (ahead + 2)
    cuda.calls.clear()
    for number in range(most_kept):
        lane.take_back(Buffer(number, dropped))
    assert dropped == [] and not any("host" in call for call in cuda.calls)
    for number in range(most_kept, 50):
        lane.take_back(Buffer(number, dropped))
    assert dropped == list(range(50 - most_kept))
    waits = [call for call in cuda.calls if "host" in call]
    assert waits == [f"the host waits for event {number} on the consumer's stream" for number in dropped]


def test_the_mark_is_an_event_on_the_teachers_stream(cuda):
    lane = CudaLane(DEVICE, most_kept=6)
    with lane.teaching():
        mark = lane.taught()
    assert lane.stream.events == [mark] and cuda.consumer.events == []


def test_the_consumer_waits_for_the_mark_before_it_gets_a_batch_and_the_host_never_does(cuda):
    lane = CudaLane(DEVICE, most_kept=6)
    mark = lane.taught()
    cuda.calls.clear()
    lane.hand_over(mark, [])
    assert cuda.calls == ["the consumer's stream waits for event 0 on the teacher's stream"]
    lane.take_back(object())
    assert not any("host" in call for call in cuda.calls)


def test_torch_is_told_who_uses_each_tensor_that_it_allocated(cuda):
    """With the consumer's stream: memory allocated on the teacher's must not be given out again before."""
    lane = CudaLane(DEVICE, most_kept=6)
    mark = lane.taught()
    cuda.calls.clear()
    lane.hand_over(mark, [Tensor(cuda.calls), Tensor(cuda.calls)])
    assert cuda.calls[0].startswith("the consumer's stream waits")
    assert cuda.calls[1:] == ["torch is told of the consumer's stream"] * 2


def test_whoever_consumes_on_another_stream_is_the_one_who_waits(cuda):
    lane = CudaLane(DEVICE, most_kept=6)
    mark = lane.taught()
    own = Stream("third", cuda.calls)
    cuda.calls.clear()
    with cuda.stream(own):
        lane.hand_over(mark, [Tensor(cuda.calls)])
        lane.take_back(object())
    assert cuda.calls == [
        "the third's stream waits for event 0 on the teacher's stream",
        "torch is told of the third's stream",
        "record event 0 on the third's stream",
    ]


def test_a_buffer_is_kept_until_the_consumer_has_passed_the_point_where_it_came_back(cuda):
    lane, dropped = CudaLane(DEVICE, most_kept=6), []
    for name in "abc":
        lane.take_back(Buffer(name, dropped))
    assert dropped == [] and len(cuda.consumer.events) == 3
    cuda.consumer.events[0].is_done = True
    lane.take_back(Buffer("d", dropped))
    assert dropped == ["a"]
    for event in cuda.consumer.events:
        event.is_done = True
    lane.take_back(Buffer("e", dropped))
    assert dropped == ["a", "b", "c", "d"]


def test_a_buffer_does_not_overtake_one_that_is_still_in_use(cuda):
    lane, dropped = CudaLane(DEVICE, most_kept=6), []
    for name in "abc":
        lane.take_back(Buffer(name, dropped))
    cuda.consumer.events[1].is_done = True
    lane.take_back(Buffer("d", dropped))
    assert dropped == []


def test_closing_waits_for_the_work_on_every_buffer_before_it_drops_it_and_for_the_teacher(cuda):
    lane = CudaLane(DEVICE, most_kept=6)
    for name in "ab":
        lane.take_back(Buffer(name, cuda.calls))
    cuda.calls.clear()
    lane.close()
    waits = [call for call in cuda.calls if "waits" in call]
    assert waits == [
        "the host waits for event 0 on the consumer's stream",
        "the host waits for event 1 on the consumer's stream",
        "the host waits for the teacher's stream",
    ]
    assert cuda.calls.index("a") > cuda.calls.index(waits[0]) and cuda.calls.index("b") > cuda.calls.index(waits[1])
    cuda.calls.clear()
    lane.close()
    assert cuda.calls == waits[2:]


def test_on_a_cpu_nothing_is_ordered_and_nothing_is_kept():
    lane, dropped = open_lane(torch.device("cpu"), ahead=1), []
    assert isinstance(lane, CpuLane) and lane.stream is None
    with lane.teaching():
        mark = lane.taught()
    lane.hand_over(mark, [torch.zeros(1)])
    lane.take_back(Buffer("a", dropped))
    assert dropped == ["a"]
    lane.close()


def test_a_gpu_gets_the_lane_with_streams(cuda):
    assert isinstance(open_lane(DEVICE, ahead=1), CudaLane)
