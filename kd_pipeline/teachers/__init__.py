"""Teachers: a frozen model behind one contract, run by PyTorch, OpenVINO, ONNX Runtime or TensorRT, or recorded."""
