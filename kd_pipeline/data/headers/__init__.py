"""What the header of an image file says, and which decoder gives its pixels."""

from kd_pipeline.data.headers.base import (
    Decoder,
    Header,
    Orientation,
    UnreadableFileError,
    check_size,
    max_file_bytes,
)
from kd_pipeline.data.headers.read import read_header

__all__ = [
    "Decoder",
    "Header",
    "Orientation",
    "UnreadableFileError",
    "check_size",
    "max_file_bytes",
    "read_header",
]
