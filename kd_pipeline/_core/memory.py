"""Give memory back that the C library keeps for later."""

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["release_free_memory"]


def release_free_memory() -> None:
    """Return the free memory of this process to the system, where the C library is GNU's; it does nothing elsewhere.

    Tensors on the CPU come and go in different sizes, and leave gaps that the library keeps: after some training steps
    they may take more than all that is in use. What comes next has other sizes and would not fit into them. A call
    takes about a millisecond, and the next tensors a little longer, so it is for the seams of a run, not for each step.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return lambda pad: None
    return trim
