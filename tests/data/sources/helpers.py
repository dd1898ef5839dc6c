"""Small data sets on disk, and short forms of what tests ask a source."""

import os
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import Source
from kd_pipeline.errors import DataError


def make_files(root: Path, *names: str) -> Path:
    """Make files that contain their own name; a name that ends in `/` makes an empty folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    return root


def write_list(folder: Path, text: str | bytes, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def relative_names(source: Source, root: Path) -> list[str]:
    return [os.path.relpath(source.name(index), root) for index in range(len(source))]


def read_paths(source: Source, *indices: int) -> list[str]:
    rows = source.read(np.array(indices, dtype=np.int64))
    assert rows.dtype == np.uint8 and rows.ndim == 2 and len(rows) == len(indices)
    return [os.fsdecode(row.tobytes().rstrip(b"\0")) for row in rows]


def error_of(call, *args, **kwargs) -> str:
    """The message of the `DataError` that the call raises."""
    with pytest.raises(DataError) as info:
        call(*args, **kwargs)
    return str(info.value)
