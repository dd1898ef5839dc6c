import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from kd_pipeline.cli import main
from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx import weights
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from tests.teachers.onnx_models import linear_model, point_at, write_external

NO_OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
BOTH = pytest.mark.parametrize("open_file", [pytest.param(OpenVINOTeacher, marks=NO_OPENVINO), OnnxRuntimeTeacher])

FLOAT = TensorProto.FLOAT
MEMORY = "*/_ORT_MEM_ADDR_/*"
"""Means an address in the memory of the process to ONNX Runtime and OpenVINO."""


def refer(*entries: tuple[str, str]) -> Callable[[TensorProto], None]:
    """A change for `write_external`: other entries of external data."""

    def change(tensor: TensorProto) -> None:
        del tensor.external_data[:]
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)

    return change


def write_memory_address(folder: Path) -> Path:
    """A model with weights at an address of this process, and a file of that odd name."""
    path = write_external(folder, refer(("location", MEMORY), ("offset", "4096"), ("length", "60")))
    odd = folder / MEMORY
    odd.parent.mkdir(parents=True)
    odd.write_bytes(bytes(5000))
    return path


@BOTH
def test_external_weights(tmp_path: Path, open_file: Callable[[Path], Teacher]) -> None:
    teacher = open_file(write_external(tmp_path / "model"))
    assert teacher.outputs.keys() == {"logits"}


@BOTH
def test_addresses_in_memory_are_refused_before_a_runtime_sees_them(
    tmp_path: Path, open_file: Callable[[Path], Teacher]
) -> None:
    with pytest.raises(
        TeacherError, match=r"the weights of 'weight' are in '\*/_ORT_MEM_ADDR_/\*'; allowed is a file in"
    ):
        open_file(write_memory_address(tmp_path / "model"))


@pytest.mark.parametrize("command", [["build-engine"], ["bench", "teacher"]], ids=" ".join)
def test_commands_refuse_addresses_in_memory_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Sequence[str]
) -> None:
    assert main([*command, "--onnx", str(write_memory_address(tmp_path / "model"))]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("kd-pipeline: ") and "are in '*/_ORT_MEM_ADDR_/*'; allowed is a file in" in line


@pytest.mark.parametrize(
    "location",
    [
        "{outside}",
        "../outside.bin",
        "inner/../../outside.bin",
        "{folder}/weights.bin",
        "inner/../weights.bin",
        "",
        ".",
        "weights.bin\0",
        "inner\\weights.bin",
        "*",
        "_ORT_MEM_ADDR_",
        "weights\x1b]0;x.bin",
    ],
)
def test_locations_that_are_not_below_the_model(tmp_path: Path, location: str) -> None:
    outside, folder = tmp_path / "outside.bin", tmp_path / "model"
    path = write_external(folder, point_at(location.format(outside=outside, folder=folder)))
    (folder / "weights.bin").rename(outside)
    with pytest.raises(
        TeacherError, match=r"model\.onnx: the weights of 'weight' are in .*; allowed is a file in the model's folder"
    ) as caught:
        read_onnx(path)
    assert str(caught.value).isprintable()


def test_links_to_external_weights_are_not_followed(tmp_path: Path) -> None:
    path = write_external(tmp_path / "model", point_at("inner/weights.bin"))
    weights, inner = tmp_path / "model" / "weights.bin", tmp_path / "model" / "inner"
    inner.mkdir()
    (inner / "weights.bin").symlink_to(weights)
    with pytest.raises(
        TeacherError, match=r"weights in 'inner/weights.bin', which cannot be read: links are not followed"
    ):
        read_onnx(path)
    (inner / "weights.bin").unlink()
    inner.rmdir()
    inner.symlink_to(tmp_path / "model")
    with pytest.raises(TeacherError, match="links are not followed"):
        read_onnx(path)
    inner.unlink()
    inner.mkdir()
    (inner / "weights.bin").hardlink_to(weights)
    assert read_onnx(path).external == {"inner/weights.bin": ((0, 60),)}


def test_external_weights_that_are_no_file(tmp_path: Path) -> None:
    path = write_external(tmp_path / "model")
    weights = tmp_path / "model" / "weights.bin"
    weights.unlink()
    with pytest.raises(TeacherError, match=r"has weights in 'weights\.bin', and there is no such file"):
        read_onnx(path)
    os.mkfifo(weights)
    with pytest.raises(TeacherError, match=r"weights in 'weights\.bin', which cannot be read: this is a pipe"):
        read_onnx(path)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(TeacherError, match=r"weights in 'weights\.bin', which cannot be read: .* directory"):
        read_onnx(path)


W = ("location", "weights.bin")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([W, ("location", "other.bin")], "have the entry 'location' twice"),
        ([W, ("offset", "0"), ("offset", "4")], "have the entry 'offset' twice"),
        ([W, ("prepacked_0", "x")], "have the entry 'prepacked_0' in their external data"),
        ([W, ("offset", "9" * 5000)], "have the offset '9+.*9+', which is no number"),
        ([W, ("offset", "-1")], "have the offset '-1', which is no number"),
        ([W, ("length", "\uff16\uff10")], "have the length '\uff16\uff10', which is no number"),
        ([W, ("length", "60.0")], "which is no number"),
        ([W, ("length", "64")], r"of the shape \[3, 5\] need 60 bytes, and 64 are in 'weights.bin'"),
        ([W, ("offset", "1")], "which cannot be read: it has 60 bytes, and the model needs 61"),
        ([W, ("offset", "9" * 19)], "it has 60 bytes, and the model needs 100000"),
        ([("location", "model.onnx")], "names itself as the file of external weights"),
        ([("location", "w" * 10_000)], "cannot be read: File name too long"),
    ],
)
def test_entries_of_external_data(tmp_path: Path, entries: Sequence[tuple[str, str]], message: str) -> None:
    path = write_external(tmp_path / "model", refer(*entries))
    (tmp_path / "model" / "other.bin").write_bytes(bytes(60))
    with pytest.raises(TeacherError, match=message) as caught:
        read_onnx(path)
    assert len(str(caught.value)) < 1000


def test_truncated_external_weights(tmp_path: Path) -> None:
    path = write_external(tmp_path / "model")
    os.truncate(tmp_path / "model" / "weights.bin", 20)
    with pytest.raises(
        TeacherError, match="cannot be read: it has 20 bytes, and the model needs 60; copy the external"
    ):
        read_onnx(path)


def test_tensors_may_share_external_weights_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_external(tmp_path / "model")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.extend(model.graph.initializer[:1] * 20)
    for index, tensor in enumerate(model.graph.initializer[1:]):
        tensor.name = f"copy {index}"
    path.write_bytes(model.SerializeToString())
    assert read_onnx(path).external == {"weights.bin": ((0, 60),)}
    monkeypatch.setattr(weights, "_MAX_SHARED", 60)
    with pytest.raises(TeacherError, match="has 1260 bytes of external weights in 60 bytes of files"):
        read_onnx(path)
    monkeypatch.setattr(weights, "_MAX_EXTERNAL", 59)
    with pytest.raises(TeacherError, match="allowed are 59"):
        read_onnx(path)


def secret() -> TensorProto:
    tensor = TensorProto(name="secret", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    return tensor


def in_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["out"], value=secret()))


def in_attributes(model: onnx.ModelProto) -> None:
    attribute = onnx.AttributeProto(name="values", type=onnx.AttributeProto.TENSORS, tensors=[secret()])
    model.graph.node.append(onnx.NodeProto(op_type="Other", domain="other", attribute=[attribute]))


def in_subgraph(model: onnx.ModelProto) -> None:
    identity = helper.make_node("Identity", ["secret"], ["out"])
    branch = helper.make_graph([identity], "branch", [], [], [secret()])
    model.graph.node.append(helper.make_node("If", ["condition"], ["out"], then_branch=branch, else_branch=branch))


def in_function(model: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["out"], value=secret())
    model.functions.append(helper.make_function("own", "f", [], ["out"], [constant], model.opset_import))


def in_default_of_function(model: onnx.ModelProto) -> None:
    attribute = helper.make_attribute("value", secret())
    model.functions.append(
        helper.make_function("own", "f", [], [], [], model.opset_import, attribute_protos=[attribute])
    )


@pytest.mark.parametrize("place", [in_attribute, in_attributes, in_subgraph, in_function, in_default_of_function])
def test_tensors_are_found_everywhere(tmp_path: Path, place: Callable[[onnx.ModelProto], None]) -> None:
    model = linear_model()
    place(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TeacherError, match="'secret' are in '/etc/hostname'"):
        read_onnx(tmp_path / "model.onnx")


def set_dims(*dims: int) -> Callable[[TensorProto], None]:
    def edit(tensor: TensorProto) -> None:
        tensor.dims[:] = dims

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_dims(-3, 5), "have the negative size -3"),
        (set_dims(2**62, 2**62), "of the shape .* need .*, and the file has 60 in raw_data"),
        (set_dims(*[1] * 65), "have 65 dimensions, more than 64"),
        (set_dims(3, 4), r"of the shape \[3, 4\] need 48 in raw_data or 12 in float_data, and the file has 60"),
        (lambda tensor: tensor.ClearField("raw_data"), "and the file has nothing"),
        (lambda tensor: setattr(tensor, "raw_data", b"1"), "and the file has 1 in raw_data"),
        (lambda tensor: setattr(tensor, "data_type", 99), "have the type 99, which is not supported"),
        (lambda tensor: setattr(tensor, "data_type", TensorProto.UNDEFINED), "have the type UNDEFINED"),
        (lambda tensor: tensor.float_data.append(1), "are in the file twice"),
        (lambda tensor: setattr(tensor.segment, "begin", 0), "are a segment of others"),
        (lambda tensor: tensor.external_data.add(key="location", value="w"), "are in the file, and in another one too"),
        (
            lambda tensor: setattr(tensor, "data_location", TensorProto.EXTERNAL),
            "are in the file, and in another one too",
        ),
        (lambda tensor: setattr(tensor, "name", "\x1b" * 10**6), "the weights of "),
    ],
)
def test_data_that_does_not_fit_its_tensor(tmp_path: Path, edit: Callable[[TensorProto], object], message: str) -> None:
    model = linear_model()
    edit(model.graph.initializer[0])
    if len(model.graph.initializer[0].name) > 100:
        set_dims(-1)(model.graph.initializer[0])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TeacherError, match=message) as caught:
        read_onnx(tmp_path / "model.onnx")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", sorted(set(TensorProto.DataType.keys()) - {"UNDEFINED"}))
def test_tensors_of_every_type_fit_as_onnx_stores_them(tmp_path: Path, name: str) -> None:
    number = TensorProto.DataType.Value(name)
    model = linear_model()
    for raw in (False, True) if name != "STRING" else (False,):
        try:
            dtype = helper.tensor_dtype_to_np_dtype(number)
            values = [b"a"] * 5 if name == "STRING" else [1] * 5
            tensor = helper.make_tensor(f"own {raw}", number, [5], values)
            if raw:
                packed = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(dtype), f"own {raw}")
                tensor = packed
        except (KeyError, ValueError, TypeError, NotImplementedError) as exc:
            pytest.skip(f"onnx cannot make one: {exc}")
        model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "model.onnx")
    if name.startswith("FLOAT6"):
        with pytest.raises(TeacherError, match=f"have the type {name}, which is not supported"):
            read_onnx(tmp_path / "model.onnx")
    else:
        assert read_onnx(tmp_path / "model.onnx").precision in ("fp32", "fp16", "bf16", "fp64")
