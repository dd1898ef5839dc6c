"""What a run leaves behind for use: the student's weights, how to build it, an ONNX file and maybe an engine."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from kd_pipeline.data.transform import EvalTransform
from kd_pipeline.engine import export_onnx
from kd_pipeline.engine.build import build_engine
from kd_pipeline.engine.build_settings import BuildSettings
from kd_pipeline.engine.parity import Samples
from kd_pipeline.errors import ExportError
from kd_pipeline.model_files import ABOUT, ENGINE, ONNX, WEIGHTS, Exported
from kd_pipeline.models import ModelSettings
from kd_pipeline.optional import require
from kd_pipeline.training.train_settings import ExportSettings
from kd_pipeline.whole_file import write_whole

__all__ = ["export_student"]

_logger = logging.getLogger("kd_pipeline")


def export_student(
    student: nn.Module,
    model: ModelSettings,
    folder: Path,
    *,
    classes: Sequence[str] | None,
    transform: EvalTransform,
    samples: Callable[[], Samples],
    wanted: ExportSettings,
) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, and `model.onnx` and `model.engine` where wanted.

    `model_files.open_model_file` opens what is there. A student that makes no ONNX file is a warning.

    Args:
        student: the network, in float32 on the CPU and in eval mode.
        model: how it is built.
        folder: made if it is not there.
        classes: names of the classes in logit order.
        transform: the evaluation transform, which says what images the network wants.
        samples: gives images as the network will see them, for the engine.
        wanted: what to write.

    Raises:
        ExportError, EngineError: there is no engine, and one is wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    content: bytes = require("safetensors.torch", extra="train").save(weights)
    about = Exported(
        model=model.model_copy(update={"pretrained": False, "checkpoint": None, "reset": ()}),
        weights_sha256=hashlib.sha256(content).hexdigest(),
        classes=None if classes is None else tuple(classes),
        transform=transform,
    )
    write_whole(folder / WEIGHTS, content)
    write_whole(folder / ABOUT, about.model_dump_json(indent=2) + "\n")
    if not wanted.onnx:
        return
    onnx, size = folder / ONNX, transform.size
    try:
        export_onnx(student, onnx, image_shape=(3, size, size), classes=classes)
    except ExportError as error:
        if wanted.engine is not None:
            raise
        _logger.warning("no ONNX file of the student: %s", error)
        return
    if (engine := wanted.engine) is not None:
        settings = BuildSettings(onnx=onnx, **engine.model_dump())
        build_engine(settings, save_engine=folder / ENGINE, samples=samples, report=_logger.info)
