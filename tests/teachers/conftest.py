"""The small network as ONNX files."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kd_pipeline.engine import export_onnx
from tests.models import CLASSES, IMAGE_SHAPE, ConvNet


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`exported(seed)` is the ONNX file of `ConvNet(seed)`; do not change it."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def export(seed: int) -> Path:
        return export_onnx(ConvNet(seed), folder / f"{seed}.onnx", image_shape=IMAGE_SHAPE, classes=CLASSES)

    return export
