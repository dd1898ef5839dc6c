import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx.file import CLASSES_KEY, OnnxFile, read_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from tests.networks import CLASSES
from tests.teachers.onnx_models import IMAGES, LOGITS, linear_model, point_at, write_external

NO_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
BOTH = pytest.mark.parametrize("open_file", [pytest.param(OpenVINOTeacher, marks=NO_OPENVINO), OnnxRuntimeTeacher])

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def read(tmp_path: Path, **changes: object) -> OnnxFile:
    path = tmp_path / "model.onnx"
    onnx.save(linear_model(**changes), path)
    return read_onnx(path)


def test_read_onnx(exported: Callable[[int], Path]) -> None:
    file = read_onnx(exported(0))
    assert (file.input_name, str(file.images)) == ("images", "[any, 3, 32, 32] float32")
    assert {name: str(spec) for name, spec in file.outputs.items()} == {
        "logits": "[any, 10] float32",
        "features": "[any, 32, 8, 8] float32",
    }
    assert file.classes == CLASSES
    assert file.precision == "fp32"


def test_single_output_is_logits(tmp_path: Path) -> None:
    file = read(tmp_path, outputs=[("scores", FLOAT, ["N", 5])])
    assert file.outputs.keys() == {"logits"}
    assert file.output_names == {"logits": "scores"}


def test_no_classes(tmp_path: Path) -> None:
    assert read(tmp_path).classes is None


def test_weights_among_inputs(tmp_path: Path) -> None:
    model = linear_model()
    model.graph.input.append(helper.make_tensor_value_info("weight", FLOAT, [3, 5]))
    onnx.save(model, tmp_path / "model.onnx")
    assert read_onnx(tmp_path / "model.onnx").input_name == "images"


@pytest.mark.parametrize("unknown", ["height", -1, None], ids=["named", "minus one", "nothing"])
def test_dynamic_image_size(tmp_path: Path, unknown: str | int | None) -> None:
    file = read(tmp_path, inputs=[("images", FLOAT, ["N", 3, unknown, unknown])])
    assert str(file.images) == "[any, 3, any, any] float32"


@pytest.mark.parametrize(
    ("weights", "precision"),
    [(FLOAT, "fp32"), (FLOAT16, "fp16"), (TensorProto.BFLOAT16, "bf16"), (TensorProto.DOUBLE, "fp64")],
)
def test_precision(tmp_path: Path, weights: int, precision: str) -> None:
    model = linear_model(weights=weights)
    scales = helper.make_tensor("scales", FLOAT, [4], [1.0] * 4)
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=scales))
    onnx.save(model, tmp_path / "model.onnx")
    assert read_onnx(tmp_path / "model.onnx").precision == precision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": [("images", FLOAT, [4, 3, 8, 8])]}, r"'images' is \[4, 3, 8, 8\] float32, a static batch of 4"),
        ({"outputs": [("logits", FLOAT, [4, 5])]}, r"'logits' is \[4, 5\] float32, a static batch of 4"),
        ({"inputs": [IMAGES, ("mask", FLOAT, ["N", 1])]}, "takes 2 inputs \\('images', 'mask'\\)"),
        ({"inputs": [("tokens", FLOAT, ["N", 77])]}, r"'tokens' is \[any, 77\] float32; .*\[N, 3, H, W\]"),
        ({"inputs": [("points", FLOAT, ["N", 3])]}, r"'points' is \[any, 3\] float32; .*\[N, 3, H, W\]"),
        ({"inputs": [("images", FLOAT, ["N", 8, 8, 3])]}, r"'images' is \[any, 8, 8, 3\] float32"),
        ({"inputs": [("images", TensorProto.UINT8, ["N", 3, 8, 8])]}, "'images' is a tensor of UINT8"),
        ({"inputs": [("images", FLOAT, None)]}, "'images' has no shape"),
        ({"outputs": [("a", FLOAT, ["N", 5]), ("b", FLOAT, ["N", 3, 8, 8])]}, "returns 'a', 'b'; .* named 'logits'"),
        (
            {"outputs": [("logits", FLOAT, ["N", 5, 1])]},
            r"'logits' are \[any, 5, 1\] float32, expected \[N, K\]",
        ),
        ({"metadata": {CLASSES_KEY: "cat, dog"}}, "is not JSON"),
        ({"metadata": {CLASSES_KEY: '{"cat": 1}'}}, "is not a list of names"),
        ({"metadata": {CLASSES_KEY: "[1, 2, 3, 4, 5]"}}, "is not a list of names"),
        ({"metadata": {CLASSES_KEY: json.dumps(["cat", "dog"])}}, "has 5 logits and 2 class names"),
    ],
)
def test_not_an_image_classifier(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(tmp_path / "model.onnx") in str(caught.value)


@BOTH
@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a model at all", bytes(range(256)) * 40])
def test_not_onnx(tmp_path: Path, open_file: Callable[[Path], Teacher], content: bytes) -> None:
    path = tmp_path / "teacher.onnx"
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=rf"teacher\.onnx \({len(content)} bytes\)"):
        open_file(path)


@BOTH
@pytest.mark.parametrize("tenths", range(1, 10))
def test_truncated_file(
    tmp_path: Path, exported: Callable[[int], Path], open_file: Callable[[Path], Teacher], tenths: int
) -> None:
    content = exported(0).read_bytes()
    path = tmp_path / "teacher.onnx"
    path.write_bytes(content[: len(content) * tenths // 10])
    with pytest.raises(TeacherError, match=r"teacher\.onnx"):
        open_file(path)


@BOTH
def test_unknown_operator(tmp_path: Path, open_file: Callable[[Path], Teacher]) -> None:
    model = linear_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "teacher.onnx")
    with pytest.raises(TeacherError, match=r"(?s)cannot load .*teacher\.onnx: .*NoSuchOperator"):
        open_file(tmp_path / "teacher.onnx")


@BOTH
def test_missing_file(tmp_path: Path, open_file: Callable[[Path], Teacher]) -> None:
    for path in (tmp_path / "teacher.onnx", tmp_path):
        with pytest.raises(TeacherError, match=f"{path}: there is no such file"):
            open_file(path)


@BOTH
def test_external_weights(tmp_path: Path, open_file: Callable[[Path], Teacher]) -> None:
    teacher = open_file(write_external(tmp_path / "model"))
    assert teacher.outputs.keys() == {"logits"}


@BOTH
@pytest.mark.parametrize(
    "location",
    [
        "{outside}",
        "../outside.bin",
        "inner/../../outside.bin",
        "link.bin",
        "{folder}/weights.bin",
        "inner/../weights.bin",
    ],
)
def test_external_weights_outside_folder(tmp_path: Path, open_file: Callable[[Path], Teacher], location: str) -> None:
    outside, folder = tmp_path / "outside.bin", tmp_path / "model"
    write_external(folder)
    shutil.copy(folder / "weights.bin", outside)
    (folder / "inner").mkdir()
    (folder / "link.bin").symlink_to(outside)
    path = write_external(folder, point_at(location.format(outside=outside, folder=folder)))
    with pytest.raises(
        TeacherError, match=r"model\.onnx: the weights of 'weight' .* out of the model's folder are not allowed"
    ):
        open_file(path)


@BOTH
def test_missing_external_weights(tmp_path: Path, open_file: Callable[[Path], Teacher]) -> None:
    path = write_external(tmp_path / "model")
    weights = tmp_path / "model" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(TeacherError, match=r"cannot load .*model\.onnx"):
        open_file(path)
    weights.unlink()
    with pytest.raises(TeacherError, match=r"are in 'weights\.bin', and there is no such file"):
        open_file(path)


def test_external_weights_in_subgraph(tmp_path: Path) -> None:
    model = linear_model()
    secret = helper.make_tensor("secret", FLOAT, [1], [1.0])
    secret.ClearField("float_data")
    secret.data_location = TensorProto.EXTERNAL
    secret.external_data.add(key="location", value="/etc/hostname")
    branch = helper.make_graph(
        [helper.make_node("Identity", ["secret"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", FLOAT, [1])],
        [secret],
    )
    condition = helper.make_tensor("condition", TensorProto.BOOL, [], [True])
    model.graph.node.append(helper.make_node("Constant", [], ["condition"], value=condition))
    model.graph.node.append(helper.make_node("If", ["condition"], ["out"], then_branch=branch, else_branch=branch))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TeacherError, match="'secret' are in '/etc/hostname'"):
        read_onnx(path)


def test_digest_covers_external_weights(tmp_path: Path) -> None:
    first, same, different = (
        write_external(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.read_bytes() == different.read_bytes()  # only the weight files differ
    assert read_onnx(first).sha256 == read_onnx(same).sha256
    assert read_onnx(first).sha256 != read_onnx(different).sha256


def test_symlink_is_resolved(tmp_path: Path) -> None:
    real = write_external(tmp_path / "real")
    link = tmp_path / "link.onnx"
    link.symlink_to(real)
    assert read_onnx(link).path == real.resolve()
    assert read_onnx(link).sha256 == read_onnx(real).sha256


@BOTH
def test_teacher_fingerprint(exported: Callable[[int], Path], open_file: Callable[[Path], Teacher]) -> None:
    teacher = open_file(exported(0))
    assert teacher.fingerprint == read_onnx(exported(0)).fingerprint(teacher.backend, "fp32")


def test_fingerprint_covers_backend_and_precision(tmp_path: Path) -> None:
    file = read(tmp_path, outputs=[LOGITS])
    pairs = [("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32")]
    assert len({file.fingerprint(*pair) for pair in pairs}) == 3
