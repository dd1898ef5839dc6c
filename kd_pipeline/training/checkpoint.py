"""Checkpoint files that survive kills and full disks, hold plain data only, and load without running code."""

import glob
import os
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline._core.atomic_write import atomic_file
from kd_pipeline._core.text import printable
from kd_pipeline.errors import StateError
from kd_pipeline.models.checkpoints import open_weights
from kd_pipeline.models.torch_files import HarmfulFileError, check_records, list_records, scan_pickles

__all__ = ["load_checkpoint", "save_checkpoint"]

_MAX_SHOWN = 300
"""Characters of what torch says, in a message."""
_MAPPINGS = {dict, OrderedDict, Counter}
_SEQUENCES = {list, tuple, set}
_LEAVES = {
    *(NoneType, bool, int, float, complex, str, bytes, bytearray),
    *(Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device, torch.layout),
}
"""Exact types that `torch.load(weights_only=True)` accepts: numpy.float64 is a float and is not accepted."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write `checkpoint` to `path` atomically: whatever happens, the file there is the old one or the new one.

    A killed run may leave a temporary file; the next save to `path` removes it.

    Raises:
        StateError: a value would not load without running code, and nothing was written; or the write failed, for
            example because the disk is full, and the old file is intact.
    """
    path = Path(path)
    _check_plain(checkpoint, "checkpoint")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            leftover.unlink(missing_ok=True)
        with atomic_file(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as exc:
        # torch reports a failed write as an unexpected file position; the OSError behind it says why.
        reason = exc.__context__ if isinstance(exc.__context__, OSError) else exc
        raise StateError(
            f"the checkpoint {path} cannot be written: {reason}{_free_space(path.parent)}. The previous file is "
            "intact; fix the cause and run the same command to resume"
        ) from exc
    _fsync_folder(path.parent)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint` or of Lightning. Code in the file is never run.

    Args:
        path: the file.
        map_location: where to put the tensors, as for `torch.load`.

    Raises:
        StateError: the file is missing, truncated, damaged, no checkpoint, or holds more than plain data.
    """
    hint = "use a different one, such as best.ckpt or last.ckpt in the same folder, or start again with train --fresh"
    try:
        with open_weights(Path(path)) as file:
            records = list_records(file)
            check_records(file, records)
            scan_pickles(file, records)
            file.seek(0)
            loaded = torch.load(file, map_location, weights_only=True)
    except FileNotFoundError:
        raise StateError(f"there is no checkpoint {path}; {hint}") from None
    except Exception as exc:  # damaged bytes can make the unpickler raise anything
        raise StateError(f"the checkpoint {path} cannot be loaded: {_why_unreadable(exc)}; {hint}") from exc
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        found = f"a {type(loaded).__name__}"
        if isinstance(loaded, dict):
            found = f"the keys {[f'{key!s:.40}' for key in [*loaded][:5]]}"
        raise StateError(f"{path} is not a training checkpoint: it holds {found} and no 'state_dict'; {hint}")
    return loaded


def _check_plain(value: Any, where: str) -> None:
    """Refuse now what `load_checkpoint` would refuse later, and name the key."""
    kind = type(value)
    if kind in _MAPPINGS:
        for key, item in value.items():
            _check_plain(key, f"the key {key!r} of {where}")
            _check_plain(item, f"{where}[{key!r}]")
        _check_plain([*getattr(value, "__dict__", {}).values()], f"an attribute of {where}")
    elif kind in _SEQUENCES:
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    elif kind not in _LEAVES:
        raise StateError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which does not load without running code; save "
            "tensors, numbers, strings, bytes, lists, tuples, sets and dicts: str(path), array.tolist(), number.item()"
        )


def _why_unreadable(exc: Exception) -> str:
    """One line; torch's own message is long and advises running the code in the file."""
    text = str(exc)
    if foreign := re.search(r"GLOBAL (\S+)", text):
        return f"it needs {_one_line(foreign[1])}, and a checkpoint holds plain data only"
    if isinstance(exc, OSError):
        return exc.strerror or text
    if isinstance(exc, HarmfulFileError):
        return f"it {text}"
    return f"it is truncated, damaged or not a checkpoint ({type(exc).__name__}: {_one_line(text)})"


def _one_line(text: str) -> str:
    return printable(text.partition("\n")[0])[:_MAX_SHOWN]


def _free_space(folder: Path) -> str:
    return f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB free)" if folder.is_dir() else ""


def _fsync_folder(folder: Path) -> None:
    """Make the new file name durable, where the filesystem supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
