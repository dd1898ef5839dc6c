from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from tests.teachers.onnx_models import LOGITS, linear_model

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def test_wrong_precision_is_refused(tmp_path: Path, exported: Callable[[int], Path]) -> None:
    with pytest.raises(TeacherError, match="holds fp32 weights, wanted fp16"):
        OnnxRuntimeTeacher(exported(0), precision="fp16")
    onnx.save(linear_model(weights=FLOAT16), tmp_path / "half.onnx")
    with pytest.raises(TeacherError, match="holds fp16 weights, wanted fp32"):
        OnnxRuntimeTeacher(tmp_path / "half.onnx")


@pytest.mark.parametrize("io", [FLOAT, FLOAT16], ids=["float32 images", "float16 images"])
def test_float16_file_gives_float32(tmp_path: Path, io: int) -> None:
    path = tmp_path / "half.onnx"
    model = linear_model(inputs=[("images", io, ["N", 3, 8, 8])], outputs=[("logits", io, ["N", 5])], weights=FLOAT16)
    onnx.save(model, path)
    teacher = OnnxRuntimeTeacher(path, precision="fp16")
    assert teacher.precision == "fp16"
    logits = teacher(torch.ones(3, 3, 8, 8, dtype=teacher.images.dtype))["logits"]
    assert logits.dtype == torch.float32
    weight = torch.tensor(numpy_helper.to_array(model.graph.initializer[0])).float()
    torch.testing.assert_close(logits, weight.sum(0).expand(3, 5), atol=5e-3, rtol=5e-3)


def test_open_output_size_is_learned(tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    open_size = ["N", 3, "height", "width"]
    onnx.save(
        linear_model(inputs=[("images", FLOAT, open_size)], outputs=[LOGITS, ("features", FLOAT, open_size)]), path
    )
    teacher = OnnxRuntimeTeacher(path)
    for size in (8, 13):
        images = torch.randn(2, 3, size, size)
        outputs = teacher(images)
        assert torch.equal(outputs["features"], images)
        assert outputs["features"].data_ptr() != images.data_ptr()


def test_num_threads_is_set(exported: Callable[[int], Path]) -> None:
    teacher = OnnxRuntimeTeacher(exported(0), num_threads=1)
    assert teacher._session.get_session_options().intra_op_num_threads == 1


def test_runtime_warnings_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = linear_model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "used by no node"))
    onnx.save(model, tmp_path / "model.onnx")
    OnnxRuntimeTeacher(tmp_path / "model.onnx")(torch.zeros(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")
