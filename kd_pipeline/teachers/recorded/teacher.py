"""A teacher that has answered already: its recorded outputs, handed out again for the very same images."""

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import StateError, TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.files import CHECKSUM, SAMPLE, Manifest, decode, open_columns

__all__ = ["RecordedTeacher"]

_MAX_BATCH = 2**31 - 1


class RecordedTeacher(Teacher):
    """Replays a recording; whoever holds the plan of the epochs asks by place instead of by image.

    It knows no answer but the recorded ones, so that a call with images is an error. A full recording in float32 has
    the fingerprint of its teacher, as it gives the same answers: a run may go on with either. `precision` is that of
    the teacher that was recorded.
    """

    def __init__(self, path: Path | str, *, device: torch.device | str = "cpu", num_verified: int = 32) -> None:
        """Open the recording in the folder `path`.

        Args:
            path: what `kd-pipeline record` has made; it may have stopped on the way.
            device: where the answers are to be.
            num_verified: images that a loader compares with the recorded ones when it opens; see `replay.py`.

        Raises:
            TeacherError: there is no recording, or it is damaged.
        """
        self.path = Path(path)
        self.manifest = manifest = Manifest.load(self.path)
        self.num_verified = num_verified
        self._arrays = open_columns(self.path, manifest)
        transform = manifest.stream["transform"]
        size, dtype = transform["size"], getattr(torch, transform["dtype"])
        super().__init__(
            backend="recorded",
            precision=manifest.teacher.precision,
            device=torch.empty(0, device=device).device,
            images=TensorSpec((None, 3, size, size), dtype),
            outputs={name: TensorSpec((None, *shape), torch.float32) for name, shape in manifest.outputs.items()},
            max_batch=_MAX_BATCH,
            classes=manifest.teacher.classes,
            fingerprint=_fingerprint(manifest),
        )

    @property
    def num_epochs(self) -> int:
        """Epochs that are whole, from 0 on."""
        return self.manifest.epochs_done

    def replay(self, epoch: int, place: NDArray[np.int64], sample: NDArray[np.int64]) -> dict[str, Tensor]:
        """What the teacher answered at these places of an epoch, by name, in fresh tensors `[N, ...]` float32.

        On a GPU the answers are copied there on the current stream, and nothing waits.

        Args:
            epoch: which epoch.
            place: `[N]`, places in its order; see `BatchPlan`.
            sample: `[N]`, positions in the dataset of the samples that are shown there.

        Raises:
            StateError: these rows were not recorded, or while another sample was shown there.
            TeacherError: the teacher is closed.
        """
        started = time.perf_counter()
        recorded = self.samples(epoch, place)
        if (recorded != sample).any():
            row = int(np.flatnonzero(recorded != sample)[0])
            raise StateError(
                f"the recording in {self.path} is of other images: at place {place[row]} of epoch {epoch} it has "
                f"sample {recorded[row]}, and sample {sample[row]} is shown; a file can be read now and could not be "
                "then, or the other way round, or the recording is damaged; record the teacher again"
            )
        answers = self.answers(epoch, place)
        self.busy_s += time.perf_counter() - started
        return answers

    def samples(self, epoch: int, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[N]`, positions in the dataset of the samples that were shown at these places.

        Raises:
            StateError: a row was not recorded.
            TeacherError: the teacher is closed.
        """
        if self._closed:
            raise TeacherError("the recorded teacher is closed; open a new one with open_teacher(...)")
        if not 0 <= epoch < self.num_epochs:
            raise StateError(
                f"epoch {epoch} was not recorded: the recording in {self.path} has {self.num_epochs} whole epochs, "
                "counted from 0; record more with kd-pipeline record --epochs, which goes on where it stopped"
            )
        outside = place[(place < 0) | (place >= self.manifest.num_rows)]
        rows: NDArray[np.int64] = np.asarray(self._arrays[SAMPLE][epoch][place[: 0 if len(outside) else None]])
        missing = [*outside.tolist(), *place[: len(rows)][rows == 0].tolist()]
        if missing:
            raise StateError(
                f"place {missing[0]} of epoch {epoch} is not in the recording in {self.path}, which has "
                f"{self.manifest.num_rows} places; record the teacher again"
            )
        return rows.astype(np.int64) - 1

    def checksums(self, epoch: int, place: NDArray[np.int64]) -> NDArray[np.uint32]:
        """`[N]`, of the images that the teacher has seen at these places; see `recording.checksums`."""
        return np.asarray(self._arrays[CHECKSUM][epoch][place])

    def answers(self, epoch: int, place: NDArray[np.int64]) -> dict[str, Tensor]:
        """The answers at places that `samples` knows, whatever is shown there now."""
        columns = {
            name: self._rows(array[epoch], place)
            for name, array in self._arrays.items()
            if name not in (SAMPLE, CHECKSUM)
        }
        return decode(columns, self.manifest)

    def _rows(self, array: NDArray[Any], place: NDArray[np.int64]) -> Tensor:
        """Rows of an array `[num_rows, ...]`, on the device; half precision is copied there as it is."""
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        # From pinned memory the copy is queued, and torch keeps the memory until it is done.
        rows = torch.empty((len(place), *array.shape[1:]), dtype=dtype, pin_memory=self.device.type == "cuda")
        np.take(array, place, axis=0, out=rows.numpy(), mode="clip")  # as "raise" would take a copy in between
        return rows.to(self.device, non_blocking=True)

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        raise TeacherError(
            f"it has only the answers recorded in {self.path}, for the training images of {self.num_epochs} epochs, "
            "and none for others; hand it to the KDDataLoader of that training, and take the teacher itself here"
        )

    def _release(self) -> None:
        self._arrays.clear()


def _fingerprint(manifest: Manifest) -> str:
    if manifest.top_k is None and manifest.dtype == "float32":
        return manifest.teacher.fingerprint
    about = f"recorded {manifest.teacher.fingerprint} top {manifest.top_k} {manifest.dtype}"
    return hashlib.sha256(about.encode()).hexdigest()
