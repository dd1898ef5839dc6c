"""Knowledge distillation on NVIDIA DALI: one decode, one buffer, teacher and student on the same pixels."""

from typing import TYPE_CHECKING

from kd_pipeline._core.lazy import lazy_exports
from kd_pipeline._core.version import __version__

if TYPE_CHECKING:
    from kd_pipeline import losses
    from kd_pipeline.batch import KDBatch
    from kd_pipeline.config import Config, load_config
    from kd_pipeline.data.mixing import MixSettings
    from kd_pipeline.data.plan import Shard
    from kd_pipeline.data.sources import Arrays, Cifar, FileList, ImageFolder, Source, open_source
    from kd_pipeline.data.transforms import EvalTransform, TrainTransform
    from kd_pipeline.evaluation import compare, evaluate, predict
    from kd_pipeline.loader import KDDataLoader
    from kd_pipeline.losses.distillation import Distillation
    from kd_pipeline.losses.settings import DistillSettings
    from kd_pipeline.models import InputAdapter, ModelSettings, open_model
    from kd_pipeline.onnx.export import export_onnx
    from kd_pipeline.teachers.base import Teacher
    from kd_pipeline.teachers.open import open_teacher
    from kd_pipeline.teachers.settings import EnsembleSettings, TeacherSettings
    from kd_pipeline.teachers.tensorrt.build import build_engine
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings
    from kd_pipeline.workflows import check, record, train

_HOMES = {
    "Arrays": "kd_pipeline.data.sources",
    "BuildSettings": "kd_pipeline.teachers.tensorrt.settings",
    "Cifar": "kd_pipeline.data.sources",
    "Config": "kd_pipeline.config",
    "DistillSettings": "kd_pipeline.losses.settings",
    "Distillation": "kd_pipeline.losses.distillation",
    "EnsembleSettings": "kd_pipeline.teachers.settings",
    "EvalTransform": "kd_pipeline.data.transforms",
    "FileList": "kd_pipeline.data.sources",
    "ImageFolder": "kd_pipeline.data.sources",
    "InputAdapter": "kd_pipeline.models",
    "KDBatch": "kd_pipeline.batch",
    "KDDataLoader": "kd_pipeline.loader",
    "MixSettings": "kd_pipeline.data.mixing",
    "ModelSettings": "kd_pipeline.models",
    "Shard": "kd_pipeline.data.plan",
    "Source": "kd_pipeline.data.sources",
    "Teacher": "kd_pipeline.teachers.base",
    "TeacherSettings": "kd_pipeline.teachers.settings",
    "TrainTransform": "kd_pipeline.data.transforms",
    "build_engine": "kd_pipeline.teachers.tensorrt.build",
    "check": "kd_pipeline.workflows",
    "compare": "kd_pipeline.evaluation",
    "evaluate": "kd_pipeline.evaluation",
    "export_onnx": "kd_pipeline.onnx.export",
    "load_config": "kd_pipeline.config",
    "losses": "kd_pipeline.losses",
    "open_model": "kd_pipeline.models",
    "open_source": "kd_pipeline.data.sources",
    "open_teacher": "kd_pipeline.teachers.open",
    "predict": "kd_pipeline.evaluation",
    "record": "kd_pipeline.workflows",
    "train": "kd_pipeline.workflows",
}
"""Where each public name lives; looked up when first used, so that importing this package loads nothing heavy."""

__all__ = [
    "Arrays",
    "BuildSettings",
    "Cifar",
    "Config",
    "DistillSettings",
    "Distillation",
    "EnsembleSettings",
    "EvalTransform",
    "FileList",
    "ImageFolder",
    "InputAdapter",
    "KDBatch",
    "KDDataLoader",
    "MixSettings",
    "ModelSettings",
    "Shard",
    "Source",
    "Teacher",
    "TeacherSettings",
    "TrainTransform",
    "__version__",
    "build_engine",
    "check",
    "compare",
    "evaluate",
    "export_onnx",
    "load_config",
    "losses",
    "open_model",
    "open_source",
    "open_teacher",
    "predict",
    "record",
    "train",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
