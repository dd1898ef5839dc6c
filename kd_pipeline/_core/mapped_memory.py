"""Memory-mapped files: pages read from the disk before somebody needs them, and a file that was cut off as an error."""

import ctypes
import errno
import mmap
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["page_in", "page_in_later"]

_WILL_NEED, _POPULATE_READ = 3, 22
"""Values of madvise(2), which Python's own has for whole mappings only. The second is of Linux 5.14."""
_FAILURES = (errno.EFAULT, errno.EIO, 133)
"""Where using the page would be a bus error; the last is EHWPOISON, memory that is broken."""


def page_in_later(arrays: Sequence[NDArray[np.uint8]]) -> None:
    """Let the system read the pages of `arrays` while this process does something else."""
    for array in arrays:
        _advise(array, _WILL_NEED)


def page_in(arrays: Sequence[NDArray[np.uint8]]) -> int | None:
    """Read the pages of `arrays`, all at once, without holding up other threads.

    Return:
        The first array that is no longer in its file, or on a disk that fails, whose use would end the process; None if
        there is none, or the system cannot say.
    """
    page_in_later(arrays)
    return next((row for row, array in enumerate(arrays) if _advise(array, _POPULATE_READ) in _FAILURES), None)


def _advise(array: NDArray[np.uint8], advice: int) -> int:
    """The error number, or 0."""
    if not array.nbytes:
        return 0
    address = array.__array_interface__["data"][0]
    start = address - address % mmap.PAGESIZE
    # The call releases the interpreter's lock.
    return ctypes.get_errno() if _madvise()(start, address + array.nbytes - start, advice) else 0


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function
