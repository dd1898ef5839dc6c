"""Recorded teacher outputs, replayed for the same images."""

import hashlib
import json
import logging
import time
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.storage import StoreSettings
from kd_pipeline.teachers.base import is_logits
from kd_pipeline.teachers.recorded.encoding import MAX_SCALE, decode
from kd_pipeline.teachers.recorded.folder import LocalFolder
from kd_pipeline.teachers.recorded.location import open_folder
from kd_pipeline.teachers.recorded.manifest import CHECKSUM, SAMPLE, RecordingManifest
from kd_pipeline.teachers.recorded.reader import RecordingReader
from kd_pipeline.teachers.settings import TeacherSettings, refuse_unused

__all__ = ["Recording", "open_recording"]

_logger = logging.getLogger("kd_pipeline")


class Recording:
    """The outputs that a teacher had for the images of a training, by epoch and position.

    It replaces the teacher of a `KDDataLoader`, which knows the positions of its images. It is not a `Teacher`: it has
    no outputs for other images. A float32 recording of whole outputs has the fingerprint of its teacher, whose outputs
    it replays exactly, so a run may resume with either.
    """

    backend = "recorded"

    def __init__(self, path: Path | str, *, num_verified: int = 32, storage: StoreSettings | None = None) -> None:
        """Open the recording in the folder `path`.

        Args:
            path: what `kd-pipeline record` has written, complete or not; or its URL. Of the latter, the parts of an
                epoch are downloaded when it is read, each verified by its sha256 and kept in the cache.
            num_verified: how many images a loader compares with the recorded ones when it opens.
            storage: how a URL is read.

        Raises:
            TeacherError: there is no recording, or it is damaged.
            StorageError: the URL cannot be read.
        """
        folder = open_folder(path, storage)
        self.path = folder.path if isinstance(folder, LocalFolder) else str(folder)
        """The folder, or its URL without credentials."""
        self.manifest = manifest = folder.load_manifest()
        self.num_verified = num_verified
        self.precision = manifest.teacher.precision
        """Of the recorded teacher."""
        self.classes = manifest.teacher.classes
        """Class names in logit order; None if the teacher did not have them."""
        self.outputs = {name: stored.spec for name, stored in manifest.outputs.items()}
        """Shape and dtype of each recorded output, by name, and of tokens how many are no part of the image."""
        self.fingerprint = _fingerprint(manifest)
        self.view = manifest.view
        """The view of the images that the outputs are for."""
        self.runtimes = manifest.teacher.runtimes
        """Of the teacher that was recorded."""
        self.busy_s = 0.0
        """Host time spent on reading, in seconds."""
        self.num_calls = 0
        """Batches read so far."""
        parts = folder.find_parts(manifest)
        self.num_epochs = parts.num_epochs
        """Complete epochs, up to the first one that is not."""
        self._reader = RecordingReader(folder, manifest, parts)

    def check_classes(self, classes: Sequence[str] | None) -> None:
        """Check that the recorded classes are `classes`, the data's; no error if one side has no names, or no logits.

        Raises:
            TeacherError: names the first difference.
        """
        has_logits = any(map(is_logits, self.outputs))
        if classes is None or self.classes is None or self.classes == tuple(classes) or not has_logits:
            return
        pairs = enumerate(zip_longest(classes, self.classes))
        label, (here, there) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
        raise TeacherError(
            f"the recording in {self.path} was made for different classes ({len(self.classes)} there, {len(classes)} "
            f"in the data): class {label} is {here!r} in the data and {there!r} there; record the teacher again"
        )

    def replay(
        self,
        epoch: int,
        position: NDArray[np.int64],
        sample: NDArray[np.int64],
        *,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """The teacher's outputs for these positions of an epoch, by name, in new tensors `[N, ...]` float32.

        On a GPU they are copied on the current stream, and the host does not wait.

        Args:
            epoch: number of the epoch, counted from 0; messages count from 1.
            position: `[N]`, positions in its order; see `BatchPlan`.
            sample: `[N]`, indices of the samples at these positions.
            device: where the outputs are needed.

        Raises:
            StateError: these rows were not recorded, or for different samples.
            TeacherError: the recording is closed or damaged.
        """
        started = time.perf_counter()
        recorded = self.samples(epoch, position)
        if (recorded != sample).any():
            row = int(np.flatnonzero(recorded != sample)[0])
            raise StateError(
                f"the recording in {self.path} is of different images: at position {position[row]} of epoch "
                f"{epoch + 1} it has sample {recorded[row]}, and sample {sample[row]} is shown; a file is readable "
                "now and was not then, or the reverse, or the recording is damaged; record the teacher again"
            )
        outputs = self.read(epoch, position, device=device)
        self.busy_s += time.perf_counter() - started
        self.num_calls += 1
        return outputs

    def samples(self, epoch: int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[N]`, indices of the samples that were recorded at these positions.

        Raises:
            StateError: a row was not recorded.
            TeacherError: the recording is closed or damaged.
        """
        if self._reader.is_closed:
            raise TeacherError("the recording is closed; open it again with Recording(path)")
        if not 0 <= epoch < self.num_epochs:
            raise StateError(
                f"epoch {epoch + 1} (in Python epoch={epoch}) was not recorded: the recording in {self.path} has "
                f"{self.num_epochs} complete epochs; record more with kd-pipeline record --epochs, which resumes"
            )
        outside = position[(position < 0) | (position >= self.manifest.num_rows)]
        if len(outside):
            raise StateError(
                f"position {outside[0]} of epoch {epoch + 1} is not in the recording in {self.path}, which has "
                f"{self.manifest.num_rows} positions; record the teacher again"
            )
        samples: NDArray[np.int64] = self._reader.read(SAMPLE, epoch, position).astype(np.int64) - 1
        if (is_outside := (samples < 0) | (samples >= self.manifest.num_rows)).any():
            row = int(np.flatnonzero(is_outside)[0])
            raise self._damaged(epoch, position[row], f"the sample {samples[row]} of {self.manifest.num_rows}")
        return samples

    def checksums(self, epoch: int, position: NDArray[np.int64]) -> NDArray[np.uint32]:
        """`[N]`, checksums of the recorded images at these positions; see `checksums.checksums`."""
        return self._reader.read(CHECKSUM, epoch, position)

    def read(
        self,
        epoch: int,
        position: NDArray[np.int64],
        *,
        device: torch.device | str = "cpu",
        outputs: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """The outputs `[N, ...]` at recorded positions, whatever samples the data has there now.

        Args:
            epoch: number of the epoch, counted from 0; messages count from 1.
            position: `[N]`, positions in its order.
            device: where the outputs are needed.
            outputs: names of those to read; defaults to all.

        Raises:
            TeacherError: the recording is damaged.
        """
        stored = {name: each for name, each in self.manifest.outputs.items() if outputs is None or name in outputs}
        columns = [column for name, each in stored.items() for column in each.columns(name)]
        return decode({name: self._rows(name, epoch, position, torch.device(device)) for name in columns}, stored)

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self._reader.close()

    def _rows(self, name: str, epoch: int, position: NDArray[np.int64], device: torch.device) -> Tensor:
        """Rows of a column on the device, with its dtype."""
        column = self._reader.columns[name]
        dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
        # From pinned memory the copy is queued, and torch keeps the memory until it is done.
        rows = torch.empty((len(position), *column.shape), dtype=dtype, pin_memory=device.type == "cuda")
        self._reader.read(name, epoch, position, out=rows.numpy())
        output, _, part = name.rpartition(".")
        if part == "classes":
            self._check_class_indices(output, epoch, position, rows.numpy())
        elif part == "scale":
            self._check_scales(name, epoch, position, rows.numpy())
        return rows.to(device, non_blocking=True)

    def _check_class_indices(self, output: str, epoch: int, position: NDArray[np.int64], classes: NDArray[Any]) -> None:
        """Refuse an index out of range here, as on a GPU it would end the process."""
        num_classes = self.manifest.outputs[output].shape[0]
        is_outside = (classes < 0) | (classes >= num_classes)
        if is_outside.any():
            row = int(np.flatnonzero(is_outside.any(1))[0])
            found = classes[row][is_outside[row]][0]
            raise self._damaged(epoch, position[row], f"the class {found} of {num_classes}")

    def _check_scales(self, name: str, epoch: int, position: NDArray[np.int64], scales: NDArray[Any]) -> None:
        """Refuse a scale that `encode` never writes, with which a whole row would be wrong."""
        is_possible = (scales >= 0) & (scales <= MAX_SCALE)  # false for NaN too
        if not is_possible.all():
            row = int(np.flatnonzero(~is_possible.reshape(len(scales), -1).all(1))[0])
            found = scales[row][~is_possible[row]].flat[0]
            raise self._damaged(epoch, position[row], f"the scale {found} in {name}")

    def _damaged(self, epoch: int, position: int, found: str) -> TeacherError:
        return TeacherError(
            f"the recording in {self.path} is damaged: at position {position} of epoch {epoch + 1} it has {found}; "
            "copy or record it again"
        )


def open_recording(settings: TeacherSettings) -> Recording:
    """Open the recording in `settings.path`.

    Raises:
        ConfigError: there is no path, or a setting that a recording does not use.
        TeacherError: there is no recording, or it is damaged.
    """
    refuse_unused(settings, "recorded")
    if settings.path is None:
        raise ConfigError("backend: recorded replays a recording; set path to its folder")
    recording = Recording(settings.path, num_verified=settings.verify, storage=settings.storage)
    _logger.info(
        "teacher: recording in %s, made by %s in %s; epochs: %d",
        recording.path,
        recording.manifest.teacher.backend,
        recording.precision,
        recording.num_epochs,
    )
    return recording


def _fingerprint(manifest: RecordingManifest) -> str:
    if all(stored.is_exact for stored in manifest.outputs.values()):
        return manifest.teacher.fingerprint
    stored = {name: stored.model_dump(mode="json") for name, stored in manifest.outputs.items()}
    about = f"recorded {manifest.teacher.fingerprint} {json.dumps(stored, sort_keys=True)}"
    return hashlib.sha256(about.encode()).hexdigest()
