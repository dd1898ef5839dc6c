"""What is said where `train.deterministic` meets an operation that torch has no deterministic way for."""

from collections.abc import Iterator
from contextlib import contextmanager

from kd_pipeline.errors import ConfigError

__all__ = ["explain_nondeterministic"]

_REFUSED = "does not have a deterministic implementation"
"""What torch says, after the name of the operation. Most of them are backward passes on a GPU, which nothing meets
before the first step."""


@contextmanager
def explain_nondeterministic() -> Iterator[None]:
    """Say what to do where torch refuses an operation.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except RuntimeError as exc:
        name, is_refused, _ = str(exc).partition(f" {_REFUSED}")
        if not is_refused:
            raise
        raise ConfigError(
            f"train.deterministic: {name}, which the student or its loss uses, {_REFUSED} on this device; use another "
            "layer, such as AvgPool2d for AdaptiveAvgPool2d, zeros for reflected padding, or bilinear for bicubic "
            "interpolation, or set train.deterministic: false"
        ) from exc
