"""What a check finds: errors and warnings of the library as rows of one table."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from kd_pipeline.errors import DataError, KDPipelineError, StateError, TeacherError

__all__ = ["Finding", "Findings"]

_logger = logging.getLogger("kd_pipeline")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found."""

    severity: Literal["error", "note"]
    """`error`: a training would be wrong, or stop. `note`: good to know."""
    where: str
    """The part of the config: a key such as `data.train`."""
    message: str
    """What was found, and what to do."""


class Findings:
    """Collects findings; the same sentence only once."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def add(self, severity: Literal["error", "note"], where: str, messages: Iterable[str]) -> None:
        """Add a finding for each of `messages`."""
        for message in messages:
            known = self._found.get(message)
            if known is None or (known.severity, severity) == ("note", "error"):
                self._found[message] = Finding(severity, where, message)

    @contextmanager
    def part(self, where: str) -> Iterator[None]:
        """Turn an error of the library inside the `with`, which it ends, and logged warnings into findings.

        Warnings do not reach the handlers of the root logger, or a command would print them twice.
        """
        warnings: list[str] = []
        handler = _Collector(warnings)
        propagated = _logger.propagate
        _logger.addHandler(handler)
        _logger.propagate = False
        try:
            yield
        except KDPipelineError as error:
            self.add("error", _place(error, where), [str(error)])
        finally:
            _logger.propagate = propagated
            _logger.removeHandler(handler)
            self.add("note", where, warnings)

    def sorted(self) -> tuple[Finding, ...]:
        """All findings, errors first."""
        return tuple(sorted(self._found.values(), key=lambda finding: finding.severity))


class _Collector(logging.Handler):
    """Appends the messages of warnings to a list."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def _place(error: KDPipelineError, where: str) -> str:
    """The part that an error is about, of the first training batch, for which data and teacher come together."""
    if where != "first batch":
        return where
    match error:
        case DataError():
            return "data.train"
        case TeacherError() | StateError():  # of a recording
            return "teacher"
        case _:
            return where
