"""What a run leaves behind for use: the student's weights, how to build it, and an ONNX file."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kd_pipeline.engine import export_onnx
from kd_pipeline.errors import ExportError
from kd_pipeline.models import ModelSettings
from kd_pipeline.optional import require

__all__ = ["export_student"]

_logger = logging.getLogger("kd_pipeline")


def export_student(
    student: nn.Module,
    settings: ModelSettings,
    folder: Path,
    *,
    image_shape: tuple[int, int, int],
    classes: Sequence[str] | None,
    transform: dict[str, Any],
) -> None:
    """Write `model.safetensors`, `model.json` and `model.onnx` into `folder`.

    Args:
        student: the network, in float32 on the CPU.
        settings: how it is built; with `checkpoint` set to the weights they open the exported network.
        folder: made if it is not there.
        image_shape: `(3, H, W)`.
        classes: names of the classes in logit order.
        transform: the evaluation transform, which says what images the network wants.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    require("safetensors.torch", extra="train").save_file(weights, folder / "model.safetensors")
    model = settings.model_copy(update={"pretrained": False, "checkpoint": folder / "model.safetensors"})
    about = {
        "model": model.model_dump(mode="json", exclude_defaults=True),
        "classes": None if classes is None else list(classes),
        "image_shape": list(image_shape),
        "transform": transform,
    }
    (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    try:
        export_onnx(student, folder / "model.onnx", image_shape=image_shape, classes=classes)
    except ExportError as error:
        _logger.warning("no ONNX file of the student: %s", error)
