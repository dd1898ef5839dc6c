"""What a model says of single images, prepared by the very transform that it was validated with."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources.image_folder import ImageFolder
from kd_pipeline.data.sources.paths import FileSource, Paths
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import DataError, TooManyBadSamplesError
from kd_pipeline.evaluation._evaluate import eval_mode, images_for, logits_of
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher

__all__ = ["Prediction", "find_images", "predict"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was said of one image, or why nothing was."""

    image: str
    """The file."""
    logits_K: Tensor | None
    """`[K]` float32 on the CPU; None where the file cannot be read."""
    problem: str | None
    """Why it cannot."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """The `count` likeliest classes and their softmax probabilities, the likeliest first; none without logits."""
        if self.logits_K is None:
            return []
        found = self.logits_K.softmax(dim=0).topk(min(count, len(self.logits_K)))
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def find_images(places: Sequence[Path]) -> list[str]:
    """The files among `places`, and for a folder all images at and below it, sorted; hidden ones are left out.

    Raises:
        DataError: a folder holds no image, or cannot be listed.
    """
    found: list[str] = []
    for place in places:
        if place.is_dir():
            folder = ImageFolder(place, labeled=False)
            # As it was written, relative or not.
            found += [str(place / os.path.relpath(folder.name(index), place)) for index in range(len(folder))]
        else:
            found.append(str(place))
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
    """Ask `model` about each of `images`, in their order; a file that cannot be read has a prediction that says why.

    The logits are those that a validation on the same files in the same batches computes.

    Args:
        model: a network, which is in eval mode meanwhile, or a teacher.
        images: the files.
        transform: what the model wants done to an image.
        batch_size: images that the model sees at once.
        device: where the model is.
        num_threads: CPU threads that decode; those that this process may use unless given.

    Raises:
        ConfigError: the model returns no logits, or a value is out of range.
        DataError: there are no images.
        TeacherError: a teacher refuses the images or fails.
    """
    if not images:
        raise DataError("there are no images to predict; name files or folders")
    paths = Paths(os.sep)
    paths.extend(map(os.path.abspath, images))
    with (
        tempfile.TemporaryDirectory() as folder,
        KDDataLoader(
            FileSource(paths, None, None, ()),
            transform,
            batch_size=batch_size,
            shuffle=False,
            shard=Shard(),
            device=device,
            num_threads=num_threads,
            on_bad_sample="substitute",
            max_bad_fraction=1.0,
            run_dir=folder,
        ) as loader,
        eval_mode(model),
    ):
        record, done = Path(folder, "bad_samples.jsonl"), 0
        try:
            for batch in loader:
                with torch.no_grad():
                    logits_NK = logits_of(model(images_for(model, batch.images))).float().cpu()
                problems = {} if bool(batch.valid.all()) else _problems(record)
                for position, logits_K in enumerate(logits_NK, start=done):
                    problem = problems.get(position)
                    yield Prediction(images[position], None if problem else logits_K, problem)
                done += len(batch)
        except TooManyBadSamplesError:  # not one of them can be read, so that nothing stands in
            problems = _problems(record)
            yield from (Prediction(image, None, problems[position]) for position, image in enumerate(images))


def _problems(record: Path) -> Mapping[int, str]:
    """Why files cannot be read, by their positions, from what the loader has written down."""
    lines = map(json.loads, record.read_text(encoding="utf-8").splitlines())
    return {line["index"]: line["reason"] for line in lines}
