"""From a model to what teachers run: ONNX files, TensorRT engines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_pipeline.engine.build import build_engine
    from kd_pipeline.engine.build_settings import BuildSettings
    from kd_pipeline.engine.export import InputAdapter, export_onnx

_HOME = {
    "BuildSettings": "kd_pipeline.engine.build_settings",
    "InputAdapter": "kd_pipeline.engine.export",
    "build_engine": "kd_pipeline.engine.build",
    "export_onnx": "kd_pipeline.engine.export",
}
"""Where each public name lives; looked up when first used, so that the process of the builder loads no torch."""

__all__ = ["BuildSettings", "InputAdapter", "build_engine", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kd_pipeline.engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
