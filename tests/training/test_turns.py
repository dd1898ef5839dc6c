"""Students take turns: one at a time, in order, each with a random state of its own."""

import random
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline._core.current_student import current_student, waited_s
from kd_pipeline.training.turns import Abandoned, Served, Turns

NAMES = ("a", "b", "c")


def serve_all(wanted: Mapping[str, int]) -> Served[int]:
    """The earliest request, doubled."""
    first = min(wanted.values())
    return Served([name for name, number in wanted.items() if number == first], lambda: 2 * first)


def draw() -> tuple[float, ...]:
    # The second number of a pair of NumPy's normal ones waits in its state.
    return random.random(), float(np.random.randn()), float(torch.rand(()))


def test_turns_go_in_order() -> None:
    turns, seen = Turns[int, int](NAMES), []

    def work(name: str) -> str:
        for number in range(2):
            seen.append((name, turns.take(name, number)))
        return f"end of {current_student()}"

    outcomes = turns.run({name: lambda name=name: work(name) for name in NAMES}, serve_all)
    assert seen == [(name, number) for number in (0, 2) for name in NAMES]
    assert outcomes == {name: f"end of {name}" for name in NAMES}


def test_who_is_ahead_waits_for_the_others() -> None:
    turns, seen = Turns[int, int](("ahead", "behind")), []

    def work(name: str, first: int) -> None:
        for number in range(first, 3):
            seen.append((name, turns.take(name, number)))

    turns.run({"ahead": lambda: work("ahead", 2), "behind": lambda: work("behind", 0)}, serve_all)
    assert seen == [("behind", 0), ("behind", 2), ("ahead", 4), ("behind", 4)]


def test_random_state_is_that_of_a_run_alone() -> None:
    def numbers(take: Callable[[int], object], seed: int) -> list[Any]:
        torch.manual_seed(seed)
        found = []
        for number in range(5):
            take(number)
            found.append(draw())
        return found

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore() -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])

    alone = {}
    for seed, name in enumerate(NAMES):
        restore()
        alone[name] = numbers(lambda number: None, seed)
    restore()
    of_caller = [draw() for _ in range(6)]
    restore()
    turns, read = Turns[int, int](NAMES), dict[int, Any]()

    def serve(wanted: Mapping[str, int]) -> Served[int]:
        names, number = [*wanted], min(wanted.values())
        return Served(names, lambda: number if number in read else read.setdefault(number, draw()))

    works = {
        name: lambda name=name, seed=seed: numbers(lambda number: turns.take(name, number), seed)
        for seed, name in enumerate(NAMES)
    }
    assert turns.run(works, serve) == alone
    # What is shared draws from the state of the caller, and so does what comes after.
    assert [*read.values(), draw()] == of_caller


def test_failure_is_that_of_one() -> None:
    turns, ended = Turns[int, int](NAMES), []

    def work(name: str) -> int:
        turns.take(name, 0)
        if name == "b":
            raise OSError("no more")
        return turns.take(name, 1)

    outcomes = turns.run(
        {name: lambda name=name: work(name) for name in NAMES},
        serve_all,
        lambda name, error: ended.append((name, error, turns.living)),
    )
    assert isinstance(outcomes["b"], OSError) and (outcomes["a"], outcomes["c"]) == (2, 2)
    assert ended == [("b", outcomes["b"], ["a", "c"]), ("a", None, ["c"]), ("c", None, [])]


def test_error_of_an_answer_is_raised_where_it_is_waited_for() -> None:
    turns = Turns[int, int](NAMES)

    def fail() -> int:
        raise OSError("no data")

    def work(name: str) -> str:
        with pytest.raises(OSError, match="no data"):
            turns.take(name, 0)
        return "caught"

    found = turns.run({name: lambda name=name: work(name) for name in NAMES}, lambda wanted: Served([*wanted], fail))
    assert {*found.values()} == {"caught"}


def test_error_outside_ends_all_threads() -> None:
    turns, closed = Turns[int, int](NAMES), []

    def work(name: str) -> None:
        try:
            turns.take(name, 0)
        except BaseException as exc:
            closed.append((name, type(exc)))
            raise

    def fail(wanted: Mapping[str, int]) -> Served[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.run({name: lambda name=name: work(name) for name in NAMES}, fail)
    assert closed == [(name, Abandoned) for name in NAMES]
    assert not [each for each in threading.enumerate() if each.name.startswith("student ")]


def test_waiting_is_the_time_of_the_others_without_what_all_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=0)
    monkeypatch.setattr("kd_pipeline.training.turns.time", SimpleNamespace(perf_counter=lambda: now.value))
    turns = Turns[int, int](("slow", "fast"))

    def pass_time(seconds: int) -> int:
        now.value += seconds
        return 0

    def work(name: str) -> float:
        turns.take(name, 0)
        pass_time(10 if name == "slow" else 1)
        turns.take(name, 1)
        return waited_s()

    def serve(wanted: Mapping[str, int]) -> Served[int]:
        return Served([*wanted], lambda: pass_time(100))

    works = {name: lambda name=name: work(name) for name in ("slow", "fast")}
    assert turns.run(works, serve) == {"slow": 1, "fast": 10}
