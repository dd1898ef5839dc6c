"""What is shown of the log where nobody has set it up, and where somebody has."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kd_pipeline._core.library_output import LIBRARIES
from kd_pipeline._core.terminal_log import log_line, log_to_terminal

LOGGER = logging.getLogger("kd_pipeline")


@contextmanager
def nobody_has_set_up_logging() -> Iterator[None]:
    """Not even pytest, which does it for each test; nothing of the block's is left."""
    root = logging.getLogger()
    before, level = root.handlers, root.level
    root.handlers = []
    try:
        ours = LOGGER.handlers.copy(), LOGGER.level
        yield
        assert (LOGGER.handlers, LOGGER.level) == ours
    finally:
        root.handlers = before
        root.setLevel(level)


def test_lines_are_shown_once_and_only_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_has_set_up_logging():
        with log_to_terminal(), log_to_terminal():  # distill calls train
            log_line("a\nb\x1b[2J")
            logging.getLogger(LIBRARIES).warning("noise")
            logging.getLogger("kd_pipeline.part").warning("c")
        log_line("d")
    assert capsys.readouterr().err == "a\n  b\\x1b[2J\nc\n"


def test_restores_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_has_set_up_logging():
        with pytest.raises(KeyError), log_to_terminal():
            raise KeyError
        log_line("a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["", "kd_pipeline"])
def test_handlers_of_the_user_are_the_only_ones(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger(name)
    with nobody_has_set_up_logging():
        logger.addHandler(handler)
        with log_to_terminal():
            LOGGER.warning("a")
        logger.removeHandler(handler)
    assert stream.getvalue() == "a\n" and capsys.readouterr().err == ""


def test_logging_that_is_set_up_meanwhile_takes_over(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with nobody_has_set_up_logging(), log_to_terminal():
        log_line("a")
        logging.basicConfig(level="INFO", stream=stream, format="%(message)s")
        log_line("b")
    assert (capsys.readouterr().err, stream.getvalue()) == ("a\n", "b\n")


def test_level_of_the_user_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_has_set_up_logging():
        LOGGER.setLevel(logging.WARNING)
        with log_to_terminal():
            LOGGER.setLevel(logging.INFO)  # for the log of a run
            log_line("a")
            LOGGER.warning("b")
        assert LOGGER.level == logging.WARNING
        LOGGER.setLevel(logging.NOTSET)
    assert capsys.readouterr().err == "b\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with nobody_has_set_up_logging(), log_to_terminal():
        log_line("a")
    assert capsys.readouterr().err == ""
