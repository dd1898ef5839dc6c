"""TensorRT engines: build, trust, load and run."""
