"""Settings of a `bench step` that takes seconds."""

from pathlib import Path
from typing import Any

from kd_pipeline.bench.step import BenchStepSettings
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.models.registry import ModelSettings

SMALL = ModelSettings(builtin="small_resnet", num_classes=10, kwargs={"width": 4})
HEADLESS = SMALL.model_copy(update={"num_classes": 0})


def short_step(root: Path, **changes: Any) -> BenchStepSettings:
    """One timed step of small networks on eight images of `root`, on one core."""
    settings: dict[str, Any] = {
        "root": root,
        "transform": TrainTransform(size=32),
        "teacher": SMALL,
        "student": SMALL,
        "batch_size": 8,
        "num_steps": 1,
        "repeats": 1,
        "num_threads": 1,
        "device": "cpu",
    }
    return BenchStepSettings(**(settings | changes))
