"""Engines: from a PyTorch module to a checked ONNX file."""

from kd_pipeline.engine.export import InputAdapter, export_onnx

__all__ = ["InputAdapter", "export_onnx"]
