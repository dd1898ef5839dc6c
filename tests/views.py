"""Render transformed images with a DALI graph alone."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.dali import FileChecker, Graph
from kd_pipeline.data.graph_settings import DecodeMode, GraphInput, GraphSettings
from kd_pipeline.data.headers import Orientation
from kd_pipeline.data.plan import uniforms
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import Draws, Views

PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""Settings that keep pixels on the scale from 0 to 255."""


def graph_settings(
    max_batch: int,
    *,
    max_pixels: int = 10**7,
    prefetch: int = 1,
    decode: DecodeMode = "window",
    orientation: Orientation = "upright",
) -> GraphSettings:
    """Settings of a graph on the CPU."""
    return GraphSettings(
        max_batch=max_batch,
        device_id=None,
        num_threads=2,
        prefetch=prefetch,
        max_pixels=max_pixels,
        decode=decode,
        hw_decoder_load=0.0,
        orientation=orientation,
    )


def samples_of(
    transform: TrainTransform | EvalTransform,
    images: Sequence[Path] | NDArray[np.uint8],
    draws: NDArray[np.float32] | None = None,
) -> GraphInput:
    """Files or pixels `[N, H, W, 3]` as the samples 0 to N - 1; `draws` defaults to those of epoch 0."""
    index = np.arange(len(images))
    if draws is None:
        draws = uniforms(index, seed=0, epoch=0, count=transform.num_draws)
    views, numbers = Views.of(transform), {IMAGES: [draws.astype(np.float64)]}
    return GraphInput(
        index=index,
        data=images if isinstance(images, np.ndarray) else _padded(images),
        crops=views.crops(numbers),
        parameters=views.parameters(numbers),
    )


def views_of(views: Views, images: NDArray[np.uint8], *, epoch: int = 0) -> tuple[Draws, dict[str, NDArray[Any]]]:
    """What all views draw, and their images, of pixels `[N, H, W, 3]` as the samples 0 to N - 1."""
    index = np.arange(len(images))
    draws = views.draw(index, seed=0, epoch=epoch)
    inputs = GraphInput(index, images, views.crops(draws), views.parameters(draws))
    settings = graph_settings(len(images))
    graph = Graph(itertools.repeat(inputs), "pixels", views, settings, FileChecker(settings))
    try:
        return draws, {name: np.array(view) for name, view in graph.take().items()}
    finally:
        graph.close()


def open_graph(
    inputs: Iterator[GraphInput],
    stores: Literal["files", "pixels"],
    transform: TrainTransform | EvalTransform,
    settings: GraphSettings,
) -> Graph:
    """A graph with a new `FileChecker`."""
    return Graph(inputs, stores, Views.of(transform), settings, FileChecker(settings))


def render(
    transform: TrainTransform | EvalTransform,
    images: Sequence[Path] | NDArray[np.uint8],
    draws: NDArray[np.float32] | None = None,
    *,
    max_pixels: int = 10**7,
    decode: DecodeMode = "window",
) -> NDArray[np.floating]:
    """The transformed images, `[N, 3, size, size]`."""
    samples = itertools.repeat(samples_of(transform, images, draws))
    settings = graph_settings(len(images), max_pixels=max_pixels, decode=decode, orientation=transform.orientation)
    graph = open_graph(samples, "pixels" if isinstance(images, np.ndarray) else "files", transform, settings)
    try:
        return np.array(graph.take()[IMAGES])
    finally:
        graph.close()


def _padded(paths: Sequence[Path]) -> NDArray[np.uint8]:
    names = np.array([os.fsencode(path) for path in paths])
    return names.view(np.uint8).reshape(len(paths), -1)
