"""Progress: a bar on a terminal that leaves nothing behind, and a line in the log."""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest

from kd_pipeline._core import progress
from kd_pipeline._core.current_student import as_student
from kd_pipeline._core.progress import progress_bar, timed


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Stderr is a terminal, of which this is the other end."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    monkeypatch.setenv("TERM", "xterm")
    with open(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("kd_pipeline._core.progress.sys", SimpleNamespace(stdout=stream, stderr=stream))
        yield ours
    os.close(ours)


def shown(terminal: int) -> list[str]:
    """Each state of the line."""
    output = b""
    with suppress(BlockingIOError):
        while True:
            output += os.read(terminal, 100_000)
    return output.decode().split("\r\x1b[K")[1:]


def test_bar_moves_and_is_erased(terminal: int) -> None:
    with progress_bar("two\nlines") as report:
        report(1, 3)
        report(3, 3)
    title, third, full, erased = shown(terminal)
    assert title == r"two\nlines"
    assert third == title + "  " + "━" * 10 + "╌" * 20 + "  1/3  0:00"
    assert full == title + "  " + "━" * 30 + "  3/3  0:00"
    assert erased == ""


def test_bar_is_one_line(terminal: int) -> None:
    with progress_bar("long" * 100):
        pass
    assert [len(text) for text in shown(terminal)] == [79, 0]


def test_bar_is_erased_before_a_record_is_printed(terminal: int, caplog: pytest.LogCaptureFixture) -> None:
    with progress_bar("work"):
        logging.getLogger("kd_pipeline").warning("a warning")
        assert shown(terminal) == ["work", ""]
        logging.getLogger("kd_pipeline").warning("another")
        assert shown(terminal) == []  # there is nothing to erase


def test_bar_is_erased_before_a_user_prints(terminal: int) -> None:
    streams = progress.sys
    with progress_bar("work"):
        print("seen", file=streams.stdout)
        assert shown(terminal) == ["work", "seen\r\n"]
    print("as before", file=streams.stdout)


@pytest.mark.parametrize(("variable", "value"), [("RANK", "1"), ("TERM", "dumb")])
def test_no_bar(terminal: int, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with progress_bar("work") as report:
        report(1, 1)
    assert shown(terminal) == []


@pytest.mark.parametrize(("rank", "lines"), [("0", ["work: 0.0 s"]), ("1", [])])
def test_time_is_logged_by_one_rank(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    lines: list[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    caplog.set_level(logging.INFO, "kd_pipeline")
    with timed("work") as report:
        report(1, 2)
    assert caplog.messages == lines
    assert capsys.readouterr().err == ""


def test_failed_work_has_no_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    with pytest.raises(ZeroDivisionError), timed("work"):
        raise ZeroDivisionError
    assert caplog.messages == []


def test_students_share_one_line(terminal: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.value))
    with progress.one_status_line():
        with as_student("small"), progress.status_line() as small:
            with as_student("wide"), progress.status_line() as wide:
                assert small is not None and wide is not None
                for now.value in (0.0, 1.9, 2.0, 3.9, 4.0):
                    with as_student("small"):
                        small("a")
                    with as_student("wide"):
                        wide("b")
            assert shown(terminal) == ["[small] a", "[small] a", "[wide] b", "[wide] b", "[small] a", ""]
            now.value = 6.0  # the turn of one that has ended
            small("c")
            assert shown(terminal) == ["[small] c"]
        assert shown(terminal) == [""]
