"""The logits of a model for a batch, or for views of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError, KDPipelineError, TeacherError
from kd_pipeline.loader.batch_loader import AnyLoader
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.modules import call_network, is_channels_last, named_outputs
from kd_pipeline.teachers.base import Teacher

__all__ = ["AVERAGED", "inputs_for", "known_views", "logits_of", "run_on_view", "view_logits", "with_mean"]

AVERAGED = "averaged"
"""What `evaluate` calls the mean of all views."""

Inputs = TypeVar("Inputs", Tensor, Tensor | Mapping[str, Tensor])


def run_on_view(model: nn.Module | Teacher, batch: KDBatch, view: str = IMAGES) -> tuple[Any, KDBatch]:
    """What `model` returns for a view of a batch, of which a teacher has its own, and the rows that it returns."""
    if isinstance(model, Teacher):
        rows = model.with_outputs(batch).of_view(model.view)
        return rows.teacher, rows
    rows = batch.of_view(view)
    return call_network(model, inputs_for(model, rows.input)), rows


def inputs_for(model: nn.Module | Teacher, inputs: Inputs) -> Inputs:
    """Inputs in dtype and memory format of a network's weights, copies if they differ; unchanged for a teacher.

    Integers and booleans, such as indices of tokens and masks, keep their dtype.
    """
    if isinstance(model, Teacher) or (weight := next(model.parameters(), None)) is None:
        return inputs
    if not isinstance(inputs, Tensor):
        return {name: inputs_for(model, each) for name, each in inputs.items()}
    if not inputs.is_floating_point():
        return inputs
    if inputs.ndim == 4 and is_channels_last(model):
        return inputs.to(weight.dtype, memory_format=torch.channels_last)
    return inputs.to(weight.dtype)


def logits_of(output: object) -> Tensor:
    """The logits `[N, K]` or `[N, K, h, w]` of a model's `output`, in float32, or in float64 if they are.

    Raises:
        ConfigError: there are none.
    """
    logits = output
    is_named = isinstance(output, Mapping)
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))  # as torchvision's networks for segmentation call them
    elif isinstance(output, tuple | list):
        logits = named_outputs(output, owner="a model").get("logits")
    if not isinstance(logits, Tensor) or logits.ndim not in ((2, 4) if is_named else (2,)):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(output).__qualname__
        raise ConfigError(
            "a model returns logits [N, K], alone, first in a tuple, or as 'logits' of a mapping (there also "
            f"[N, K, h, w]), got {found}"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def known_views(loader: AnyLoader, names: Sequence[str]) -> Sequence[str]:
    """`names`, all of which are views of `loader`, and none that of the mean.

    Raises:
        ConfigError: there is none, or no such view.
    """
    known = loader.views.names if isinstance(loader, KDDataLoader) else [IMAGES]
    if AVERAGED in names:
        raise ConfigError(f"views: {AVERAGED!r} is the name of the mean of all; give the view another")
    for name in names:
        if name not in known:
            raise ConfigError(
                f"views: the loader has no view {name!r}{suggest(name, known)}; it has {', '.join(known)}"
            )
    if not names:
        raise ConfigError(f"views names none; the loader has {', '.join(known)}")
    return names


def view_logits(model: nn.Module | Teacher, batch: KDBatch, view: str) -> Tensor:
    """The logits for the input of `batch`, or for one of its views, in float32 or float64.

    Raises:
        ConfigError: there are none, they are of the pixels of a view that masks do not follow, or the model fails on
            the size of the view.
    """
    if view == IMAGES:
        return logits_of(call_network(model, inputs_for(model, batch.input)))
    images = batch.view(view)
    copies = [images] if images.ndim == 4 else [copy.contiguous() for copy in images.unbind(1)]
    height, width = images.shape[-2:]
    try:
        found = [logits_of(call_network(model, inputs_for(model, copy))) for copy in copies]
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # a network may raise anything about a size
        is_ours = isinstance(exc, KDPipelineError) and not isinstance(exc, TeacherError)
        if is_ours or images.shape[-2:] == batch.images.shape[-2:]:
            raise
        raise ConfigError(
            f"view {view!r}: the model fails on images of {height} x {width}, probably as it takes one size only: "
            f"{exc}. Leave out this size"
        ) from exc
    if found[0].ndim == 4:
        raise ConfigError(
            f"view {view!r}: masks, with which logits of pixels are compared, follow images alone; evaluate the view "
            f"{IMAGES}, with the size that you want in the transform"
        )
    return _mean(found)


def with_mean(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Also the mean of several views."""
    return logits if len(logits) == 1 else {**logits, AVERAGED: _mean([*logits.values()])}


def _mean(logits: Sequence[Tensor]) -> Tensor:
    """Logits whose probabilities are the mean of those of `logits`."""
    if len(logits) == 1:
        return logits[0]
    # In double precision, or the last bits would depend on the batch.
    each_VNK = torch.stack([each.double().log_softmax(dim=1) for each in logits])
    return (each_VNK.logsumexp(dim=0) - math.log(len(logits))).to(logits[0].dtype)
