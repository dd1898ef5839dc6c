"""Builds engines with TensorRT-RTX; skips the test if it is not installed."""

from pathlib import Path

import pytest

trt = pytest.importorskip("tensorrt_rtx")


class Logger(trt.ILogger):
    """Collects TensorRT's errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)


LOGGER = Logger()
"""TensorRT keeps its first logger for the life of the process."""


def assert_builds(path: Path) -> None:
    """A strongly typed engine can be built from the file, for batches of 1 to 16 images, without an error message."""
    LOGGER.errors.clear()
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("images", (1, *shape), (8, *shape), (16, *shape))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, LOGGER.errors
    assert not LOGGER.errors
