"""Predictions of a model for single images, prepared by the transform that it was validated with."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_pipeline._core.finite import has_softmax
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.sources.files.paths import FileSource, PathTable
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, DataError, TooManyBadSamplesError
from kd_pipeline.evaluation._logits import inputs_for, logits_of
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.pixels import predicted_classes
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.modules import call_network, eval_mode, named_outputs
from kd_pipeline.teachers.base import Teacher

__all__ = ["NOT_FINITE", "Prediction", "find_images", "predict"]

NOT_FINITE = "the model's logits for it hold NaN or inf; check its weights, and in float16 use float32"
"""The problem of an image for which the model is at fault."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The logits for one image, or the class of each of its pixels, or why there are none."""

    image: str
    """The file."""
    logits_K: Tensor | None
    """`[K]` float32 on the CPU; None if there is a problem, and of a model for segmentation."""
    problem: str | None
    """Why the file cannot be read, or that the model has no finite logits for it."""
    mask: Tensor | None = None
    """`[H, W]` int64 on the CPU: the class of each pixel of what the transform makes; None of a classifier."""
    num_classes: int | None = None
    """Number of classes of the pixels."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """The `count` most likely classes with their softmax probabilities, sorted; empty without logits.

        Of pixels, those of the most pixels with their share of the image.
        """
        if self.mask is not None:
            counts = self.mask.flatten().bincount()
            most = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]]
            return [(label, float(counts[label]) / self.mask.numel()) for label in most[:count]]
        if self.logits_K is None:
            return []
        top = self.logits_K.softmax(dim=0).topk(min(count, len(self.logits_K)))
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def find_images(paths: Sequence[Path]) -> list[str]:
    """The files in `paths`, and for each folder all images in and below it, sorted; hidden ones are skipped.

    Raises:
        DataError: a folder holds no image, or cannot be listed.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):  # as Path.is_dir(), but False for names that are too long
            folder = ImageFolder(path, labeled=False)
            # As given, relative or not.
            found += [str(path / os.path.relpath(folder.name(index), path)) for index in range(len(folder))]
        else:
            found.append(str(path))
    return found


def predict(
    model: nn.Module | Teacher,
    images: Sequence[str],
    transform: EvalTransform,
    *,
    batch_size: int = 64,
    device: torch.device | str = "auto",
    num_threads: int | None = None,
) -> Iterator[Prediction]:
    """Predict each of `images`, in their order; if there is none for a file, it says why.

    The logits are those of a validation on the same files in the same batches.

    Args:
        model: a network, which is in eval mode meanwhile, or a teacher.
        images: paths of the files.
        transform: the transform of the images for this model.
        batch_size: images in a batch.
        device: of the model.
        num_threads: CPU threads for decoding; defaults to the cores of this process.

    Raises:
        ConfigError: the model has no classes, as a backbone without a head, or a value is out of range.
        DataError: there are no images.
        TeacherError: a teacher refuses the images or fails.
    """
    if not images:
        raise DataError("there are no images to predict; name files or folders")
    file_paths = PathTable(os.sep)
    file_paths.extend(map(os.path.abspath, images))
    with (
        KDDataLoader(
            FileSource(file_paths),
            transform,
            batch_size=batch_size,
            shuffle=False,
            shard=Shard(),
            device=device,
            num_threads=num_threads,
            on_bad_sample="substitute",
            max_bad_fraction=1.0,
        ) as loader,
        eval_mode(model),
    ):
        num_done = 0
        try:
            for batch in loader:
                with torch.no_grad():
                    output = call_network(model, inputs_for(model, batch.input))
                _check_classes(output)
                logits = logits_of(output).float().cpu()
                is_finite_N = has_softmax(logits).view(len(logits), -1).all(dim=1).tolist()
                rows = zip(logits, is_finite_N, batch.valid.tolist(), strict=True)
                for index, (row, is_finite, is_valid) in enumerate(rows, num_done):
                    sample = None if is_valid else loader.bad_sample(index)
                    problem = sample.reason if sample is not None else None if is_finite else NOT_FINITE
                    yield _prediction(images[index], row, problem, (batch.images.shape[2], batch.images.shape[3]))
                num_done += len(batch)
        except TooManyBadSamplesError:  # not a single file can be read, so there is no substitute
            for bad in loader.bad_samples[num_done:]:
                yield Prediction(images[bad.index], None, bad.reason)


def _prediction(image: str, logits: Tensor, problem: str | None, size: tuple[int, int]) -> Prediction:
    """Of logits `[K]` of an image, or `[K, h, w]` of its pixels."""
    if problem is not None:
        return Prediction(image, None, problem)
    if logits.ndim == 1:
        return Prediction(image, logits, None)
    mask = predicted_classes(logits[None], size)[0]
    return Prediction(image, None, None, mask, num_classes=len(logits))


def _check_classes(output: object) -> None:
    """Raise a ConfigError for the features of a network without a head."""
    if isinstance(output, Mapping) and LOGITS not in named_outputs(output, owner="a model"):
        raise ConfigError(
            f"the model has no classes to predict: it returns {', '.join(map(repr, output))}, the features of a "
            "network without a head. Fine-tune it on labeled images, with kd-pipeline train stage=baseline and its "
            "weights as student.checkpoint, or measure its features with kd-pipeline eval"
        )
