"""What a run keeps to be verified by: what a few of its batches held and led to, and digests of its weights."""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.cpu_features import cpu_name
from kd_pipeline._core.files import open_regular
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.version import __version__
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import StateError
from kd_pipeline.teachers.recorded.checksums import checksums

__all__ = [
    "FIRST_STEPS",
    "BatchLine",
    "Evidence",
    "Measured",
    "StartLine",
    "WeightsLine",
    "describe_batch",
    "describe_machine",
    "describe_weights",
    "is_kept",
    "read_evidence",
    "tensor_digest",
]

FIRST_STEPS = 8
"""Batches at the start of a run that are all kept, and the step after which the weights are."""
_FIRST_OF_EPOCH = 2
"""Batches at the start of each epoch that are kept: they follow the checkpoints, from which steps are replayed."""
_DRAWN = 2
"""More batches of each epoch, anywhere in it."""
_ROWS = 8
"""Images of a batch whose pixels, and teacher outputs, are kept: more would take time."""
_MAX_BYTES = 64 * 2**20
_MAX_LINE = 4 * 2**20
_MAX_DAMAGED = 1000
"""Lines that are none, after which a file is no evidence; a crash leaves one."""
_PACKAGES = ("torch", "numpy", "timm", "torchvision", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")
"""On whose versions the last bits of a training depend; that of DALI is a field of the stream."""

_Hex = Annotated[str, Field(pattern=r"^(-?0x[01]\.[0-9a-f]{1,13}p[+-](\d{1,3}|10[01]\d|102[0-3])|nan|-?inf)$")]
"""A float as Python's `float.hex` writes it: exact."""
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{8,128}$")]
"""A SHA-256, or a checksum for each image."""
_Count = Annotated[int, Field(ge=0, le=2**62)]
_Name = Annotated[str, Field(max_length=200)]


class Measured(Settings):
    """A tensor: a digest that is equal bit for bit or not, and a number that is close if only roundings differ."""

    digest: _Digest
    value: _Hex
    """The root of the mean square, in float64."""


class BatchLine(Settings):
    """A batch that was trained on."""

    kind: Literal["batch"] = "batch"
    epoch: _Count
    """Counted from 0, as `batch` is."""
    batch: _Count
    step: _Count
    """Optimizer steps after it."""
    samples: tuple[_Count, ...] = Field(max_length=_ROWS)
    """Which samples the first rows are."""
    order: _Digest
    """Of the indices and validity of all rows."""
    labels: _Digest | None
    """Of the labels, or weights of classes, of all rows, and of the masks of the first rows."""
    pixels: dict[_Name, Measured]
    """Of the first rows, by view or input."""
    teacher: dict[_Name, Measured]
    """The teacher's outputs for the first rows."""
    terms: dict[_Name, _Hex]
    """The loss, and each of its terms."""


class WeightsLine(Settings):
    """The weights after a step."""

    kind: Literal["weights"] = "weights"
    epoch: _Count
    step: _Count
    weights: dict[_Name, Measured]
    """Of `student`, of its average `ema`, and of what the `loss` learns."""


class StartLine(Settings):
    """A start of the training, or the resuming of it."""

    kind: Literal["start"] = "start"
    step: _Count
    """The optimizer steps that were done before."""
    config: dict[str, Any]
    identity: dict[str, Any]
    """What else the checkpoints say about the run, without the names of the classes."""
    machine: dict[_Name, Annotated[str, Field(max_length=1000)] | int | None]
    processes: int = Field(ge=1)
    samples: dict[str, Any] | None = None
    """Digests of the samples in groups, of the first start."""


_Line = TypeAdapter[StartLine | BatchLine | WeightsLine](
    Annotated[StartLine | BatchLine | WeightsLine, Field(discriminator="kind")]
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of a run; what a killed process did after the checkpoint that the next one resumed from is gone."""

    starts: list[StartLine] = field(default_factory=list)
    batches: dict[tuple[int, int], BatchLine] = field(default_factory=dict)
    """By epoch and batch."""
    weights: dict[int, WeightsLine] = field(default_factory=dict)
    """By step."""
    damaged: list[int] = field(default_factory=list)
    """Numbers of lines that are none, counted from 1."""

    def add(self, line: StartLine | BatchLine | WeightsLine) -> None:
        """Add a line; a start drops what came after its step, which is trained again."""
        match line:
            case BatchLine():
                self.batches[line.epoch, line.batch] = line
            case WeightsLine():
                self.weights[line.step] = line
            case StartLine():
                self.starts.append(line)
                for key in [key for key, each in self.batches.items() if each.step > line.step]:
                    del self.batches[key]
                for step in [step for step in self.weights if step > line.step]:
                    del self.weights[step]


def is_kept(seed: int, epoch: int, number: int, num_batches: int) -> bool:
    """Whether evidence is kept of a batch: a function of these numbers, which nobody can choose.

    Args:
        seed: of the run.
        epoch: counted from 0.
        number: of the batch in it, counted from 0.
        num_batches: of the epoch.
    """
    if number < (FIRST_STEPS if epoch == 0 else _FIRST_OF_EPOCH):
        return True
    drawn = hashlib.sha256(f"kd_pipeline evidence {seed} {epoch}".encode()).digest()
    numbers = (int.from_bytes(drawn[8 * each : 8 * each + 8], "little") for each in range(_DRAWN))
    return number in {each % max(num_batches, 1) for each in numbers}


def describe_batch(batch: KDBatch, *, epoch: int, number: int, step: int, terms: Mapping[str, Tensor]) -> BatchLine:
    """What is kept of a batch; waits for a GPU.

    Args:
        batch: as the loader gave it.
        epoch: counted from 0.
        number: of the batch in it, counted from 0.
        step: optimizer steps after it.
        terms: the loss and its terms, scalars.
    """
    views = batch.views if IMAGES in batch.inputs else {}
    masks = None if batch.masks is None else batch.masks[:_ROWS]
    labels = [each for each in (batch.labels, masks) if each is not None]
    return BatchLine(
        epoch=epoch,
        batch=number,
        step=step,
        samples=tuple(batch.index[:_ROWS].tolist()),
        order=tensor_digest([batch.index, batch.valid]),
        labels=tensor_digest(labels) if labels else None,
        pixels={name: _measured_pixels(each[:_ROWS]) for name, each in {**batch.inputs, **views}.items()},
        teacher={name: _measured([each[:_ROWS]]) for name, each in batch.teacher.items()},
        terms={name: float(each).hex() for name, each in terms.items()},
    )


def describe_weights(parts: Mapping[str, Mapping[str, Tensor]], *, epoch: int, step: int) -> WeightsLine:
    """What is kept of weights by their names, in parts."""
    weights = {}
    for part, tensors in parts.items():
        names = sorted(tensors)
        if names:
            digest = tensor_digest((tensors[name] for name in names), start=" ".join(names))
            weights[part] = Measured(digest=digest, value=_root_mean_square(tensors.values()).hex())
    return WeightsLine(epoch=epoch, step=step, weights=weights)


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """What the last bits of a training on `device` depend on."""
    found: dict[str, str | int | None] = {"kd_pipeline": __version__, "cpu": cpu_name()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["device"] = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    found["threads"] = torch.get_num_threads()
    return found


def read_evidence(path: Path) -> Evidence | None:
    """The evidence in a file; None if there is none. A line that is damaged is counted.

    Raises:
        StateError: it cannot be read, or is too large.
    """
    found = Evidence()
    try:
        with open_regular(path, max_bytes=_MAX_BYTES) as file:
            number = 0
            while line := file.readline(_MAX_LINE):
                number += 1
                if line.isspace():
                    continue
                try:
                    found.add(_Line.validate_python(json.loads(line)))
                except (ValidationError, ValueError, RecursionError):
                    found.damaged.append(number)
                    if len(found.damaged) > _MAX_DAMAGED:
                        raise StateError(f"{path} holds no evidence of a run") from None
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StateError(f"{path} cannot be read: {exc.strerror}") from None
    return found


def tensor_digest(tensors: Iterable[Tensor], *, start: str = "") -> str:
    """A SHA-256 over shapes, dtypes and bits of tensors in the usual memory order, after a text."""
    digest = hashlib.sha256(start.encode())
    for tensor in _on_cpu(tensors):
        digest.update(f"{tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _measured(tensors: list[Tensor]) -> Measured:
    return Measured(digest=tensor_digest(tensors), value=_root_mean_square(tensors).hex())


def _measured_pixels(images: Tensor) -> Measured:
    """By the checksums of recordings, one after the other, if they are for such pixels."""
    if images.ndim < 3 or images.dtype not in (torch.float32, torch.float16):
        return _measured([images])
    digest = "".join(f"{each:08x}" for each in checksums(images.contiguous()).tolist())
    return Measured(digest=digest or "0" * 8, value=_root_mean_square([images]).hex())


def _root_mean_square(tensors: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            total += float(tensor.detach().double().square().sum())
            count += tensor.numel()
    return math.sqrt(total / count) if count else 0.0


def _on_cpu(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor.detach().cpu().contiguous() for tensor in tensors)
