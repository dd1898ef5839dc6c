"""The plain values of a config, as a run's folder keeps them."""

from pathlib import Path

import pytest
import yaml

from kd_pipeline.config.config import Config
from kd_pipeline.training.environment import shown_settings
from tests.training import tiny_run

LOGITS = {"loss": "soft_target", "student": "logits"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"probe": None, "distill": {"loss": None, "features": [LOGITS]}},
        {"teacher": {"members": [{"onnx": "a.onnx"}, {"onnx": "b.onnx"}]}},
        {"teacher": {"members": {"one": {"onnx": "a.onnx"}, "two": {"onnx": "b.onnx", "max_batch": 8}}}},
    ],
)
def test_written_config_is_the_same_config(changes: dict[str, object], tmp_path: Path) -> None:
    config = tiny_run.settings(tmp_path, "run", **changes)
    written = yaml.safe_load(yaml.safe_dump(shown_settings(config, exclude_none=True)))
    assert Config.model_validate(written).model_dump() == config.model_dump()
    assert "max_batch" not in str(written["teacher"]).replace("'max_batch': 8", "")  # what is None by default
