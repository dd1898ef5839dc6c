"""What a backbone finds alike, for a report: some validation images, and beside each its nearest in the features."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from kd_pipeline._core.progress import progress_bar
from kd_pipeline.errors import ConfigError, DataError, KDPipelineError
from kd_pipeline.evaluation._logits import run_on_view
from kd_pipeline.evaluation.frozen import feature_name
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.backbone import POOLED
from kd_pipeline.models.modules import eval_mode, named_outputs
from kd_pipeline.report.data_uri import picture_uri
from kd_pipeline.report.neighbors import save_neighbors
from kd_pipeline.workflows.exported import OpenedModel
from kd_pipeline.workflows.reporting.run import RunRecord
from kd_pipeline.workflows.reporting.samples import Access, open_exported, open_images, sentence
from kd_pipeline.workflows.stage import view_of

__all__ = ["draw_neighbors"]

_NUM_QUERIES, _NUM_NEIGHBORS = 8, 8
_MAX_IMAGES = 4000
_SIDE = 56


def draw_neighbors(run: RunRecord, access: Access, *, report: Callable[[str], object]) -> tuple[str | None, str]:
    """The picture as a `data:` URI, and how to read it or why there is none."""
    with ExitStack() as stack:
        try:
            config, loader = open_images(run, access, stack)
            student = open_exported(run, config, loader, access, stack)
            report(f"{run.name}: features of {min(len(loader.source), _MAX_IMAGES):,} validation images")
            view = view_of(config, run.stage)
            return _draw(loader, *_features(student, loader, view)), _caption(loader)
        except (KDPipelineError, RuntimeError) as exc:
            return None, f"There is no picture of nearest neighbors: {sentence(exc)}"


def _caption(loader: KDDataLoader) -> str:
    labels = " A green frame is the same class, a red one another." if loader.source.labels is not None else ""
    return (
        "On the left validation images, and beside each those that the student's features find most alike, the most "
        f"alike first. They should show the same kind of thing.{labels}"
    )


@torch.no_grad()
def _features(student: OpenedModel, loader: KDDataLoader, view: str) -> tuple[Tensor, Tensor]:
    """Unit vectors `[N, D]` of the readable images and their indices `[N]`, on the CPU."""
    vectors, indices, num_done = [], [], 0
    with progress_bar("features of val") as report_done, eval_mode(student.model):
        for batch in loader:
            output, rows = run_on_view(student.model, batch, view)
            outputs = named_outputs(output, vector=POOLED, owner="the student")
            name = feature_name({each: tensor.ndim for each, tensor in outputs.items()}, POOLED)
            if name is None or len(rows) != len(batch):
                raise ConfigError("the student returns no single vector for an image")
            is_usable = rows.valid & outputs[name].isfinite().all(1)
            vectors.append(normalize(outputs[name].float(), dim=1)[is_usable].cpu())
            indices.append(rows.index[is_usable].cpu())
            num_done += len(batch)
            report_done(num_done, len(loader.source))
            if num_done >= _MAX_IMAGES:
                break
    return torch.cat(vectors), torch.cat(indices)


def _draw(loader: KDDataLoader, vectors: Tensor, indices: Tensor) -> str:
    number = min(_NUM_NEIGHBORS, len(indices) - 1)
    if number < 1:
        raise DataError("there are too few images for neighbors")
    rows = torch.arange(min(_NUM_QUERIES, len(indices)))  # of a loader that shuffles
    cosine_QN = vectors[rows] @ vectors.T
    cosine_QN[torch.arange(len(rows)), rows] = -2.0  # an image is no neighbor of its own
    nearest_QK = indices[cosine_QN.topk(number, dim=1).indices]
    queries = indices[rows]
    images = np.stack([np.stack([_pixels(loader, index) for index in each]) for each in nearest_QK.tolist()])
    labels = loader.source.labels
    is_alike = None if labels is None else labels[nearest_QK.numpy()] == labels[queries.numpy()][:, None]
    with tempfile.TemporaryDirectory(prefix="kd_pipeline-") as folder:
        file = Path(folder) / "neighbors.png"
        asked = np.stack([_pixels(loader, index) for index in queries.tolist()])
        save_neighbors(asked, {"student": (images, is_alike)}, file)
        return picture_uri(file)


def _pixels(loader: KDDataLoader, index: int) -> NDArray[np.uint8]:
    """The whole image in a square, `[56, 56, 3]`."""
    image = Image.fromarray(loader.pixels(index))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (_SIDE, _SIDE), "white")
    square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    return np.asarray(square)
