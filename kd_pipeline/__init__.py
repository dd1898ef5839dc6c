"""Knowledge distillation on NVIDIA DALI: one decode, one buffer, teacher and student on the same pixels."""

from typing import TYPE_CHECKING

from kd_pipeline._core.lazy import lazy_exports

if TYPE_CHECKING:
    from kd_pipeline import losses as losses
    from kd_pipeline._core.version import __version__ as __version__
    from kd_pipeline.batch import KDBatch as KDBatch
    from kd_pipeline.config import Config as Config
    from kd_pipeline.config import load_config as load_config
    from kd_pipeline.data.mixing import MixSettings as MixSettings
    from kd_pipeline.data.order import ShardShuffle as ShardShuffle
    from kd_pipeline.data.own_ops import OwnOp as OwnOp
    from kd_pipeline.data.plan import Shard as Shard
    from kd_pipeline.data.size_schedule import ProgressiveSize as ProgressiveSize
    from kd_pipeline.data.size_schedule import RandomSize as RandomSize
    from kd_pipeline.data.sources import Arrays as Arrays
    from kd_pipeline.data.sources import BaseSource as BaseSource
    from kd_pipeline.data.sources import Cifar as Cifar
    from kd_pipeline.data.sources import FileList as FileList
    from kd_pipeline.data.sources import HuggingFace as HuggingFace
    from kd_pipeline.data.sources import ImageFolder as ImageFolder
    from kd_pipeline.data.sources import Noise as Noise
    from kd_pipeline.data.sources import Parquet as Parquet
    from kd_pipeline.data.sources import Source as Source
    from kd_pipeline.data.sources import Tar as Tar
    from kd_pipeline.data.sources import open_source as open_source
    from kd_pipeline.data.transforms import EvalTransform as EvalTransform
    from kd_pipeline.data.transforms import TrainTransform as TrainTransform
    from kd_pipeline.data.views import EvalView as EvalView
    from kd_pipeline.data.views import FollowingView as FollowingView
    from kd_pipeline.data.views import TrainView as TrainView
    from kd_pipeline.evaluation import compare as compare
    from kd_pipeline.evaluation import evaluate as evaluate
    from kd_pipeline.evaluation import predict as predict
    from kd_pipeline.loader import BatchLoader as BatchLoader
    from kd_pipeline.loader import KDDataLoader as KDDataLoader
    from kd_pipeline.losses.distillation import Distillation as Distillation
    from kd_pipeline.losses.settings import DistillSettings as DistillSettings
    from kd_pipeline.models import InputAdapter as InputAdapter
    from kd_pipeline.models import ModelSettings as ModelSettings
    from kd_pipeline.models import open_model as open_model
    from kd_pipeline.onnx.export import export_onnx as export_onnx
    from kd_pipeline.teachers.base import Teacher as Teacher
    from kd_pipeline.teachers.open import open_teacher as open_teacher
    from kd_pipeline.teachers.recorded.recording import Recording as Recording
    from kd_pipeline.teachers.settings import EnsembleSettings as EnsembleSettings
    from kd_pipeline.teachers.settings import TeacherGroupSettings as TeacherGroupSettings
    from kd_pipeline.teachers.settings import TeacherSettings as TeacherSettings
    from kd_pipeline.teachers.tensorrt.build import build_engine as build_engine
    from kd_pipeline.teachers.tensorrt.settings import BuildSettings as BuildSettings
    from kd_pipeline.training.settings import TrainSettings as TrainSettings
    from kd_pipeline.workflows import check as check
    from kd_pipeline.workflows import distill as distill
    from kd_pipeline.workflows import record as record
    from kd_pipeline.workflows import train as train
    from kd_pipeline.workflows import verify as verify
    from kd_pipeline.workflows import write_report as write_report

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "kd_pipeline._core.version": ["__version__"],
        "kd_pipeline.batch": ["KDBatch"],
        "kd_pipeline.config": ["Config", "load_config"],
        "kd_pipeline.data.mixing": ["MixSettings"],
        "kd_pipeline.data.order": ["ShardShuffle"],
        "kd_pipeline.data.own_ops": ["OwnOp"],
        "kd_pipeline.data.plan": ["Shard"],
        "kd_pipeline.data.size_schedule": ["ProgressiveSize", "RandomSize"],
        "kd_pipeline.data.sources": [
            "Arrays",
            "BaseSource",
            "Cifar",
            "FileList",
            "HuggingFace",
            "ImageFolder",
            "Noise",
            "Parquet",
            "Source",
            "Tar",
            "open_source",
        ],
        "kd_pipeline.data.transforms": ["EvalTransform", "TrainTransform"],
        "kd_pipeline.data.views": ["EvalView", "FollowingView", "TrainView"],
        "kd_pipeline.evaluation": ["compare", "evaluate", "predict"],
        "kd_pipeline.loader": ["BatchLoader", "KDDataLoader"],
        "kd_pipeline.losses": ["losses"],
        "kd_pipeline.losses.distillation": ["Distillation"],
        "kd_pipeline.losses.settings": ["DistillSettings"],
        "kd_pipeline.models": ["InputAdapter", "ModelSettings", "open_model"],
        "kd_pipeline.onnx.export": ["export_onnx"],
        "kd_pipeline.teachers.base": ["Teacher"],
        "kd_pipeline.teachers.open": ["open_teacher"],
        "kd_pipeline.teachers.recorded.recording": ["Recording"],
        "kd_pipeline.teachers.settings": ["EnsembleSettings", "TeacherGroupSettings", "TeacherSettings"],
        "kd_pipeline.teachers.tensorrt.build": ["build_engine"],
        "kd_pipeline.teachers.tensorrt.settings": ["BuildSettings"],
        "kd_pipeline.training.settings": ["TrainSettings"],
        "kd_pipeline.workflows": ["check", "distill", "record", "train", "verify", "write_report"],
    },
)
