"""Knowledge distillation on NVIDIA DALI: one decode, one buffer, teacher and student on the same pixels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_pipeline import losses
    from kd_pipeline.batch import KDBatch
    from kd_pipeline.config import Config, load_config
    from kd_pipeline.data.plan import Shard
    from kd_pipeline.data.source import open_source
    from kd_pipeline.data.transform import EvalTransform, TrainTransform
    from kd_pipeline.engine import export_onnx
    from kd_pipeline.loader import KDDataLoader
    from kd_pipeline.teachers import Teacher, TeacherSettings, open_teacher

__version__ = "0.1.0"

_HOME = {
    "Config": "kd_pipeline.config",
    "EvalTransform": "kd_pipeline.data.transform",
    "KDBatch": "kd_pipeline.batch",
    "KDDataLoader": "kd_pipeline.loader",
    "Shard": "kd_pipeline.data.plan",
    "Teacher": "kd_pipeline.teachers",
    "TeacherSettings": "kd_pipeline.teachers",
    "TrainTransform": "kd_pipeline.data.transform",
    "export_onnx": "kd_pipeline.engine",
    "load_config": "kd_pipeline.config",
    "losses": "kd_pipeline.losses",
    "open_source": "kd_pipeline.data.source",
    "open_teacher": "kd_pipeline.teachers",
}
"""Where each public name lives; looked up when first used, so that importing this package loads nothing heavy."""

__all__ = [
    "Config",
    "EvalTransform",
    "KDBatch",
    "KDDataLoader",
    "Shard",
    "Teacher",
    "TeacherSettings",
    "TrainTransform",
    "export_onnx",
    "load_config",
    "losses",
    "open_source",
    "open_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kd_pipeline' has no attribute {name!r}")
    module = import_module(_HOME[name])
    return module if name == "losses" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
