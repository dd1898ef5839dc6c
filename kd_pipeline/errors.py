"""The exceptions of kd_pipeline. Messages say what is wrong, where (file, key, sample, rank) and what to do.

KDPipelineError
├── ConfigError (also a ValueError)
├── MissingPackageError (also an ImportError)
├── DataError
│   ├── BadSampleError
│   ├── TooManyBadSamplesError
│   └── StorageError
│       ├── FileTooLargeError
│       └── NoSuchFileError
├── TeacherError
│   └── EngineError
├── ExportError
├── NonFiniteError (also a FloatingPointError)
└── StateError
"""

import re
from pathlib import Path

__all__ = [
    "BadSampleError",
    "ConfigError",
    "DataError",
    "EngineError",
    "ExportError",
    "FileTooLargeError",
    "KDPipelineError",
    "MissingPackageError",
    "NoSuchFileError",
    "NonFiniteError",
    "StateError",
    "StorageError",
    "TeacherError",
    "TooManyBadSamplesError",
    "shown",
]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?:[^/?#]*@)?([^?#]*)")


class KDPipelineError(Exception):
    """Base class of all exceptions that kd_pipeline raises on purpose."""


class ConfigError(KDPipelineError, ValueError):
    """A setting, a config file or an override is invalid."""


class MissingPackageError(KDPipelineError, ImportError):
    """An optional package is not installed; the message holds the `pip install` line."""


class DataError(KDPipelineError):
    """A dataset is invalid: a missing folder, an empty class, labels out of range."""


class BadSampleError(DataError):
    """One sample cannot be read.

    Attributes:
        index: index of the sample in the dataset.
        path: the file, or a description such as `images.npy[17]` for a sample that is not a file.
        num_bytes: size of the file in bytes, or None if it does not exist.
        reason: why it cannot be read, in one line.
    """

    def __init__(self, index: int, path: str | Path, num_bytes: int | None, reason: str) -> None:
        size = "no such file" if num_bytes is None else f"{num_bytes} bytes"
        super().__init__(
            f"sample {index} cannot be read: {path} ({size}): {reason}. Remove or repair it, "
            "or set on_bad_sample: substitute to train on without it"
        )
        self.index, self.path, self.num_bytes, self.reason = index, str(path), num_bytes, reason


class TooManyBadSamplesError(DataError):
    """More samples are unreadable than `max_bad_fraction` allows.

    Args:
        num_bad: samples that are unreadable so far.
        num_samples: all samples of the dataset.
        max_bad_fraction: the limit that was passed; None if no readable sample is left.
        last: the last of the unreadable samples.
        advice: what to do.
    """

    def __init__(
        self, num_bad: int, num_samples: int, max_bad_fraction: float | None, last: BadSampleError, advice: str
    ) -> None:
        limit = "" if max_bad_fraction is None else f", which is more than max_bad_fraction={max_bad_fraction:g} allows"
        super().__init__(
            f"{num_bad} of {num_samples} samples cannot be read{limit}; the last one is sample {last.index}, "
            f"{last.path}: {last.reason}. To continue, {advice}"
        )


class StorageError(DataError):
    """Data cannot be read or written where it is: a file that was cut or has changed, a store that does not answer.

    Attributes:
        path: the file, or its URL without credentials and query.
        key: the sample in the file, if the error is about one.
        offset: the byte of the file at which the range that was asked for starts, if it was about a range.
        reason: why, and what to do.
    """

    def __init__(
        self, path: str | Path, reason: str, *, key: str | int | None = None, offset: int | None = None
    ) -> None:
        self.path, self.key, self.offset, self.reason = shown(path), key, offset, reason
        where = "".join([f", sample {key}" * (key is not None), f", byte {offset}" * (offset is not None)])
        super().__init__(f"{self.path}{where}: {reason}")


class FileTooLargeError(StorageError):
    """A file has more bytes than its reader allows, and was not read."""


class NoSuchFileError(StorageError):
    """There is no such file in the store."""


class TeacherError(KDPipelineError):
    """A teacher cannot be opened, rejects its input, fails, or is already closed."""


class EngineError(TeacherError):
    """A TensorRT engine cannot be built, verified, loaded or run; the message holds TensorRT's own text."""


class ExportError(KDPipelineError):
    """A model cannot be exported to ONNX, or the outputs of the exported file differ from the model's."""


class NonFiniteError(KDPipelineError, FloatingPointError):
    """NaN or inf where a number is needed: a loss, a gradient, weights to be saved, or every output of a model."""


class StateError(KDPipelineError):
    """A saved loader state or a checkpoint does not match, cannot be read or cannot be written."""


def shown(path: str | Path) -> str:
    """A path as messages show it: a URL has neither its user nor its query and fragment, which may be credentials."""
    match = _URL.match(str(path))
    return match[1] + match[2] if match else str(path)
