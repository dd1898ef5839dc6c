"""Whether all readers of an EXIF block find the same orientation in it."""

import struct

__all__ = ["is_clear"]

_ORIENTATION = 0x0112
_SHORT = 3


def is_clear(block: memoryview) -> bool:
    """Whether the EXIF block `block`, which starts as a TIFF does, has its orientation as the standard says, or none.

    DALI takes any other type of number as zero, and Pillow takes its value.
    """
    order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]))
    if order is None:
        return False
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, place)
            if tag == _ORIENTATION:
                return (kind, count) == (_SHORT, 1)
    except struct.error:  # without an orientation up to where it is cut off
        pass
    return True
