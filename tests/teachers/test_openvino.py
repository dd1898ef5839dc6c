import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from kd_pipeline.errors import TeacherError
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from tests.teachers.onnx_models import linear_model

openvino = pytest.importorskip("openvino")
CAPABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize(("precision", "capability"), [("fp16", "FP16"), ("bf16", "BF16")])
def test_unsupported_precision_is_refused(exported: Callable[[int], Path], precision: str, capability: str) -> None:
    if capability in CAPABILITIES:
        pytest.skip(f"this CPU has {capability}")
    with pytest.raises(TeacherError, match=rf"runs .*0\.onnx in (fp32|bf16), wanted {precision}"):
        OpenVINOTeacher(exported(0), precision=precision)


def test_float32_is_not_lowered_to_bfloat16(exported: Callable[[int], Path]) -> None:
    teacher = OpenVINOTeacher(exported(0))
    compiled = teacher._request.get_compiled_model()
    assert teacher.precision == "fp32"
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_runtime_options(exported: Callable[[int], Path]) -> None:
    compiled = OpenVINOTeacher(exported(0), num_threads=1)._request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("PERFORMANCE_HINT") == "LATENCY"


def test_float16_file_gives_float32(tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    path = tmp_path / "half.onnx"
    onnx.save(
        linear_model(inputs=[("images", half, ["N", 3, 8, 8])], outputs=[("logits", half, ["N", 5])], weights=half),
        path,
    )
    teacher = OpenVINOTeacher(path)
    assert str(teacher.images) == "[any, 3, 8, 8] float16"
    logits = teacher(torch.ones(3, 3, 8, 8, dtype=torch.float16))["logits"]
    assert logits.dtype == torch.float32
    weight = torch.tensor(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])).float()
    torch.testing.assert_close(logits, weight.sum(0).expand(3, 5), atol=5e-3, rtol=5e-3)


@pytest.mark.slow
def test_signals_survive_closing_in_any_order(
    exported: Callable[[int], Path],
) -> None:
    """OpenVINO replaces the thread's signal stack and restores the old one, which may have been freed by then."""
    script = (
        "import gc, signal\n"
        "from pathlib import Path\n"
        "from kd_pipeline.teachers.openvino import OpenVINOTeacher\n"
        f"first, second = (OpenVINOTeacher(Path({str(exported(0))!r})) for _ in range(2))\n"
        "for teacher in (first, second):\n"
        "    teacher.close()\n"
        "    gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: print('handled'))\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
