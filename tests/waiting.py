"""Waiting for what other threads do."""

import time
from collections.abc import Callable

__all__ = ["wait_until"]


def wait_until(is_true: Callable[[], object]) -> None:
    """Return when `is_true()` is; a test that waits for more than 20 s fails."""
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
