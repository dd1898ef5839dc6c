"""A run on images of another height than width, from training to the exported student."""

from pathlib import Path

import pytest
import torch

from kd_pipeline.workflows.exported import open_model_file
from tests.training import tiny_run

SIZE = [8, 12]
SMALL = {"builtin": "small_resnet", "kwargs": {"width": 4}}


@pytest.mark.slow
def test_run_on_rectangles(tmp_path: Path) -> None:
    tiny_run.write_digits(tmp_path)
    changes = {
        "data__train__transform": {**tiny_run.TRAIN, "size": SIZE},
        "data__val__transform": {**tiny_run.EVAL, "size": SIZE},
        "teacher": {"backend": "pytorch", "model": {**SMALL, "pretrained": False}},
        "student": SMALL,
        **tiny_run.WITH_ONNX,
    }
    result = tiny_run.run(tmp_path, "run", **changes)
    assert 0 <= result.evaluations["val"].top1 <= 1
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    folder, cpu = tmp_path / "run", torch.device("cpu")
    own = open_model_file(folder, image_shape=(3, *SIZE), device=cpu).model(images)
    onnx = open_model_file(folder / "exported" / "model.onnx", image_shape=(3, *SIZE), device=cpu)
    torch.testing.assert_close(onnx.model(images)["logits"], own, rtol=1e-3, atol=1e-4)
