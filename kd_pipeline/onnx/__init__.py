"""ONNX files: read, export, edit, convert to half precision, quantize, run."""
