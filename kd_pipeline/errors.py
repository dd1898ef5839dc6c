"""Everything that can go wrong, as one tree.

    KDPipelineError
    ├── ConfigError             a setting, a config file or an override is wrong         (also a ValueError)
    ├── MissingPackageError     an optional package is not installed                     (also an ImportError)
    ├── DataError               a dataset is not what it claims to be
    │   ├── BadSampleError      one sample cannot be read; names path, byte size, reason
    │   └── TooManyBadSamplesError   more unreadable samples than `max_bad_fraction` allows
    ├── TeacherError            a teacher cannot be opened, refuses its input or failed
    │   └── EngineError         a TensorRT engine cannot be built, trusted, loaded or run
    ├── ExportError             a model could not be exported to ONNX, or the file disagrees with the model
    └── StateError              a saved position or checkpoint does not fit; names each field old → new

Every message says what is wrong, where (file, key, sample, rank) and what to do about it.
"""

from pathlib import Path

__all__ = [
    "BadSampleError",
    "ConfigError",
    "DataError",
    "EngineError",
    "ExportError",
    "KDPipelineError",
    "MissingPackageError",
    "StateError",
    "TeacherError",
    "TooManyBadSamplesError",
]


class KDPipelineError(Exception):
    """Base of every error that kd_pipeline raises on purpose."""


class ConfigError(KDPipelineError, ValueError):
    """A setting, a config file or an override is wrong."""


class MissingPackageError(KDPipelineError, ImportError):
    """An optional package is not installed; the message holds the `pip install` line."""


class DataError(KDPipelineError):
    """A dataset is not what it claims to be: no such folder, an empty class, labels out of range."""


class BadSampleError(DataError):
    """One sample cannot be read.

    Attributes:
        index: position of the sample in its dataset.
        path: the file, or a description such as `images.npy[17]` for samples that are not files.
        num_bytes: size of the file in bytes, or None where there is no such file.
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
    """More samples are unreadable than `max_bad_fraction` allows."""


class TeacherError(KDPipelineError):
    """A teacher cannot be opened, refuses its input, failed, or is already closed."""


class EngineError(TeacherError):
    """A TensorRT engine cannot be built, trusted, loaded or run; the message holds TensorRT's own text."""


class ExportError(KDPipelineError):
    """A model could not be exported to ONNX, or the exported file disagrees with the model."""


class StateError(KDPipelineError):
    """A saved loader position or a checkpoint does not fit, cannot be read or cannot be written."""
