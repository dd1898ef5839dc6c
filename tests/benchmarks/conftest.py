"""The photographs of tests/bench."""

from tests.bench.conftest import photographs

__all__ = ["photographs"]
