import copy

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kd_pipeline.losses.teacher_queue import TeacherQueue


def rows(*numbers: float) -> Tensor:
    return torch.tensor(numbers)[:, None].expand(-1, 2).contiguous()


def contents(queue: TeacherQueue) -> list[float]:
    """Newest first."""
    return queue.vectors[queue.is_filled, 0].tolist()


def push(queue: TeacherQueue, *numbers: float, invalid: tuple[int, ...] = ()) -> list[float]:
    """The references of the batch that count."""
    valid = torch.tensor([row not in invalid for row in range(len(numbers))])
    references, counts = queue(rows(*numbers), valid)
    return references[counts, 0].tolist()


def test_references_are_the_batch_and_the_queue():
    queue = TeacherQueue(4, 2)
    assert push(queue, 1, 2) == [1, 2]
    assert push(queue, 3, 4) == [3, 4, 2, 1]
    assert push(queue, 5) == [5, 4, 3, 2, 1]
    assert contents(queue) == [5, 4, 3, 2]


def test_batch_larger_than_queue():
    queue = TeacherQueue(3, 2)
    assert push(queue, 1, 2, 3, 4, 5) == [1, 2, 3, 4, 5]
    assert contents(queue) == [5, 4, 3]


def test_invalid_rows_do_not_enter():
    queue = TeacherQueue(4, 2)
    nan = float("nan")
    assert push(queue, 1, nan, 3, invalid=(1,)) == [1, 3]
    assert push(queue, nan, nan, invalid=(0, 1)) == [3, 1]
    assert push(queue, 5, nan, invalid=(1,)) == [5, 3, 1]
    assert contents(queue) == [5, 3, 1]
    assert queue.vectors.isfinite().all()


def test_eval_mode_changes_nothing():
    queue = TeacherQueue(4, 2)
    push(queue, 1, 2)
    queue.eval()
    assert push(queue, 3) == [3, 2, 1]
    assert contents(queue) == [2, 1]


def test_resumes():
    queue, twin = TeacherQueue(4, 2), TeacherQueue(4, 2)
    push(queue, 1, 2, 3)
    twin.load_state_dict(copy.deepcopy(queue.state_dict()))
    assert push(queue, 4, 5) == push(twin, 4, 5)
    assert contents(queue) == contents(twin) == [5, 4, 3, 2]


def test_references_outlive_the_next_batch():
    """The backward pass of a loss comes after the queue has changed."""
    queue = TeacherQueue(2, 2)
    push(queue, 1, 2)
    references, _ = queue(rows(3, 4), torch.tensor([True, True]))
    push(queue, 5, 6)
    assert references[:, 0].tolist() == [3, 4, 2, 1]


def test_no_gpu_sync():
    with FakeTensorMode():
        queue = TeacherQueue(4, 2)
        references, counts = queue(torch.ones(3, 2), torch.ones(3, dtype=torch.bool))
    assert (references.shape, counts.shape) == ((7, 2), (7,))
