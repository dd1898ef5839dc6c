import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from kd_pipeline.errors import TeacherError
from kd_pipeline.models.input_adapter import InputAdapter
from kd_pipeline.onnx.file import ADAPTER_KEY, CLASSES_KEY, OUTPUTS_KEY, OnnxFile, outputs_metadata, read_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.teachers.openvino import OpenVINOTeacher
from tests.networks import CLASSES, ConvNet
from tests.teachers.onnx_models import IMAGES, LOGITS, linear_model, point_at, training_mode_model, write_external

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
    folded = 16 + 32  # batch norm has become the convolutions' bias
    assert file.num_parameters == sum(each.numel() for each in ConvNet(0).parameters()) - folded


def test_weights_of_other_files_are_parameters_without_being_read(tmp_path: Path) -> None:
    onnx.save(linear_model(), tmp_path / "inside.onnx")
    found = read_onnx(write_external(tmp_path / "outside"))
    assert found.external and found.num_parameters == read_onnx(tmp_path / "inside.onnx").num_parameters > 0


def test_running_statistics_are_no_parameters(tmp_path: Path) -> None:
    model = training_mode_model()
    onnx.save(model, tmp_path / "normalized.onnx")
    sizes = {tensor.name: np.prod(tensor.dims) for tensor in model.graph.initializer}
    assert {"g", "b", "m", "v"} < sizes.keys()
    assert read_onnx(tmp_path / "normalized.onnx").num_parameters == sum(sizes.values()) - sizes["m"] - sizes["v"]


def test_single_output_is_logits(tmp_path: Path) -> None:
    file = read(tmp_path, outputs=[("scores", FLOAT, ["N", 5])])
    assert file.outputs.keys() == {"logits"}
    assert file.output_names == {"logits": "scores"}


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        ([("pooled", ["N", 5])], {"pooled": "pooled"}),
        ([("logits", ["N", 5])], {"logits": "logits"}),
        ([("image_embeds", ["N", 5])], {"logits": "image_embeds"}),
        ([("tokens", ["N", 17, 5])], {"tokens": "tokens"}),
        ([("map", ["N", 5, 4, 4])], {"map": "map"}),
        ([("a", ["N", 5]), ("b", ["N", 3, 8, 8])], {"a": "a", "b": "b"}),
        ([("pooled", ["N", 5]), ("logits", ["N", 3])], {"pooled": "pooled", "logits": "logits"}),
    ],
)
def test_outputs_keep_their_names(
    tmp_path: Path, outputs: list[tuple[str, list[str | int]]], names: dict[str, str]
) -> None:
    file = read(tmp_path, outputs=[(name, FLOAT, shape) for name, shape in outputs])
    assert file.output_names == names
    assert [spec.shape[1:] for spec in file.outputs.values()] == [tuple(shape[1:]) for _, shape in outputs]


def test_prefix_tokens_and_names_from_metadata(tmp_path: Path) -> None:
    outputs = [("pooled", FLOAT, ["N", 5]), ("tokens", FLOAT, ["N", 17, 5]), ("more", FLOAT, ["N", None, 5])]
    metadata = {OUTPUTS_KEY: outputs_metadata({"pooled": None, "tokens": 5, "more": 3})}
    file = read(tmp_path, outputs=outputs, metadata=metadata)
    assert {name: spec.num_prefix_tokens for name, spec in file.outputs.items()} == {
        "pooled": None,
        "tokens": 5,
        "more": 3,
    }
    one = [("embedding", FLOAT, ["N", 5])]
    assert read(tmp_path, outputs=one).output_names == {"logits": "embedding"}
    named = read(tmp_path, outputs=one, metadata={OUTPUTS_KEY: outputs_metadata({"embedding": None})})
    assert named.output_names == {"embedding": "embedding"}


TOKENS = [("tokens", FLOAT, ["N", 17, 5]), ("vector", FLOAT, ["N", 5])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("five", "the metadata kd_pipeline.outputs is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("5", "is no object with a number for each output"),
        ('["tokens"]', "is no object"),
        ('{"other": 1}', "has 'other', and the outputs are 'tokens', 'vector'"),
        ('{"\\u001b]0;x": 1}', r"has '\\x1b\]0;x', and the outputs are"),
        (
            '{"tokens": -1}',
            r"'tokens' is \[any, 17, 5\] float32 and has, .*, a number of prefix tokens that is negative",
        ),
        ('{"tokens": 17}', "17 prefix tokens"),
        ('{"tokens": 1%s}' % ("0" * 4000), "a number of prefix tokens that is too large"),
        ('{"tokens": 1.0}', "that is float"),
        ('{"tokens": NaN}', "that is float"),
        ('{"tokens": true}', "that is bool"),
        ('{"tokens": "1"}', "that is str"),
        ('{"tokens": [1]}', "that is list"),
        ('{"vector": 0}', r"'vector' is \[any, 5\] .*0 prefix tokens, which only tokens \[N, L, D\] have"),
    ],
)
def test_hostile_outputs_in_metadata(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        read(tmp_path, outputs=TOKENS, metadata={OUTPUTS_KEY: text})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_class_names_need_logits(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"has class names in .* and no output 'logits'"):
        read(tmp_path, outputs=TOKENS, metadata={CLASSES_KEY: json.dumps(["cat", "dog"])})


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
        ({"inputs": [("weights", FLOAT, ["N"])]}, r"'weights' is \[any\] float32; .*\[N, 3, H, W\], or rows"),
        ({"inputs": [("images", FLOAT, ["N", 8, 8, 3])]}, r"'images' is \[any, 8, 8, 3\] float32"),
        ({"inputs": [("images", TensorProto.UINT8, ["N", 3, 8, 8])]}, "'images' is a tensor of UINT8"),
        ({"inputs": [("images", FLOAT, None)]}, "'images' has no shape"),
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
def test_not_a_teacher(tmp_path: Path, changes: dict[str, object], message: str) -> None:
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
    with pytest.raises(TeacherError, match=f"{tmp_path / 'teacher.onnx'}: there is no such file"):
        open_file(tmp_path / "teacher.onnx")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "device.onnx").symlink_to("/dev/zero")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.onnx"))
    reasons = {"pipe": "a pipe", "device": "a device", "loop": "[Ll]oop", "folder": "a directory", "socket": "a socket"}
    for name, reason in reasons.items():
        with pytest.raises(TeacherError, match=f"cannot be read: .*{reason}"):
            read_onnx(tmp_path / f"{name}.onnx")


@BOTH
def test_external_weights(tmp_path: Path, open_file: Callable[[Path], Teacher]) -> None:
    teacher = open_file(write_external(tmp_path / "model"))
    assert teacher.outputs.keys() == {"logits"}


def test_digest_covers_external_weights(tmp_path: Path) -> None:
    first, same, different = (
        write_external(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.read_bytes() == different.read_bytes()  # only the weight files differ
    assert read_onnx(first).sha256 == read_onnx(same).sha256
    assert read_onnx(first).sha256 != read_onnx(different).sha256


def test_only_the_used_parts_of_external_files_are_hashed(tmp_path: Path) -> None:
    path = write_external(tmp_path / "model")
    before, weights = read_onnx(path), tmp_path / "model" / "weights.bin"
    weights.write_bytes(weights.read_bytes() + bytes(100))
    assert read_onnx(path).sha256 == before.sha256
    assert before.external == {"weights.bin": ((0, 60),)}


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


def write_single(folder: Path, *, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    onnx.save(linear_model(seed=seed), folder / "model.onnx")
    return folder / "model.onnx"


WRITE = pytest.mark.parametrize("write", [write_single, write_external], ids=["one file", "external weights"])


@BOTH
@WRITE
def test_what_is_hashed_is_what_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_file: Callable[[Path], Teacher],
    write: Callable[..., Path],
) -> None:
    path = write(tmp_path / "model", seed=0)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = open_file(path)
    private_copy = OnnxFile.private_copy

    @contextmanager
    def copy_and_swap(file: OnnxFile) -> Iterator[Path]:
        with private_copy(file) as copy:
            write(tmp_path / "model", seed=1)
            yield copy

    monkeypatch.setattr(OnnxFile, "private_copy", copy_and_swap)
    found = open_file(path)
    assert found.fingerprint == wanted.fingerprint
    assert torch.equal(found(images)["logits"], wanted(images)["logits"])
    other = open_file(path)
    assert other.fingerprint != wanted.fingerprint
    assert not torch.allclose(other(images)["logits"], wanted(images)["logits"])


@BOTH
@WRITE
def test_a_file_that_is_swapped_before_it_is_copied_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_file: Callable[[Path], Teacher],
    write: Callable[..., Path],
) -> None:
    path = write(tmp_path / "model", seed=0)

    def read_and_swap(path: Path) -> OnnxFile:
        file = read_onnx(path)
        write(tmp_path / "model", seed=1)
        return file

    monkeypatch.setattr(sys.modules[open_file.__module__], "read_onnx", read_and_swap)
    with pytest.raises(TeacherError, match="was changed while it was opened"):
        open_file(path)


def test_a_private_copy_is_private_and_short_lived(tmp_path: Path) -> None:
    path = write_external(tmp_path / "model", point_at("parts/./weights.bin"))
    (tmp_path / "model" / "parts").mkdir()
    (tmp_path / "model" / "weights.bin").rename(tmp_path / "model" / "parts" / "weights.bin")
    with read_onnx(path).private_copy() as copy:
        assert copy.parent.stat().st_mode & 0o777 == 0o700
        assert {str(each.relative_to(copy.parent)) for each in copy.parent.rglob("*") if each.is_file()} == {
            "model.onnx",
            "parts/weights.bin",
        }
        assert read_onnx(copy).sha256 == read_onnx(path).sha256
    assert not copy.parent.exists()


def test_no_space_for_a_private_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = read_onnx(write_external(tmp_path / "model"))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "open", lambda *arguments: (_ for _ in ()).throw(full))
    with pytest.raises(TeacherError, match=r"cannot be copied to .*: No space left on device; .* TMPDIR"):
        file.private_copy().__enter__()


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (CLASSES_KEY, "[" * 100_000, "is not JSON of names"),
        (CLASSES_KEY, f"[{'9' * 5000}]", "is not"),
        (CLASSES_KEY, '["\\ud800"]', "is not a list of names"),
        (CLASSES_KEY, " " * (2**23 + 1), "with more than 8388608 characters"),
        (ADAPTER_KEY, "{}", "is no input adapter: 'mean': Field required"),
        (ADAPTER_KEY, "[" * 100_000, "is no input adapter: Invalid JSON"),
        (ADAPTER_KEY, '{"mean": [0, 0, 0], "std": [0, 1, 1]}', "is no input adapter: 'std'"),
        (ADAPTER_KEY, f'{{"mean": [0, 0, 0], "std": [1, 1, 1], "size": {"9" * 5000}}}', "is no input adapter"),
        (ADAPTER_KEY, '{"mean": [0, 0, 0], "std": [1, 1, 1], "\\u001b]0;x": 1}', r"adapter: '\\x1b\]0;x': Extra"),
    ],
)
def test_damaged_metadata(tmp_path: Path, key: str, text: str, message: str) -> None:
    with pytest.raises(TeacherError, match=f"metadata {key} .*{message}|metadata {key} {message}") as caught:
        read(tmp_path, metadata={key: text})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_metadata_that_is_there_twice(tmp_path: Path) -> None:
    model = linear_model(metadata={CLASSES_KEY: '["a", "b", "c", "d", "e"]'})
    model.metadata_props.append(model.metadata_props[0])
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(TeacherError, match=f"has the metadata {CLASSES_KEY} twice"):
        read_onnx(tmp_path / "model.onnx")


def test_the_adapter_of_a_file_is_read(tmp_path: Path) -> None:
    adapter = InputAdapter(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), size=8)
    assert read(tmp_path, metadata={ADAPTER_KEY: adapter.model_dump_json()}).input_adapter == adapter
    assert read(tmp_path).input_adapter is None


def change(field: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        *parents, name = field.split(".")
        message: Any = model
        for parent in parents:
            message = message[int(parent)] if parent.isdigit() else getattr(message, parent)
        setattr(message, name, value)

    return apply


def add_dims(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * 99)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("graph.output.0.name", "logits\x1b]0;x"), r"'logits\\x1b\]0;x' is no name to print"),
        (change("graph.input.0.name", "i" * 10_000), "is no name to print, or too long"),
        (change("graph.input.0.type.tensor_type.elem_type", 99), "'images' is a tensor of 99"),
        (change("opset_import.0.domain", "other"), "does not say once which version"),
        (lambda model: model.opset_import.add(version=3), "does not say once which version"),
        (
            change("opset_import.0.version", 10**9),
            "uses opset 1000000000 of ai.onnx, and the installed onnx knows opset",
        ),
        (lambda model: model.opset_import.add(domain="ai.onnx", version=10**9), "uses opset 1000000000 of ai.onnx"),
        (lambda model: model.opset_import.add(domain="x\x1b", version=10**9), r"uses opset 1000000000 of x\\x1b"),
        (
            lambda model: model.functions.add(name="f", domain="d").opset_import.add(version=10**9),
            "uses opset 1000000000 of ai.onnx",
        ),
        (
            lambda model: model.graph.output.extend([*model.graph.output]),
            "returns 'logits', 'logits'; export the teacher with",
        ),
        (
            lambda model: model.graph.output.extend(model.graph.output[:1] * 999),
            "and 990 more; export the teacher with",
        ),
        (lambda model: model.graph.ClearField("output"), "returns nothing; export the teacher with at least one"),
        (add_dims, "101 dimensions"),
        (lambda model: model.graph.sparse_initializer.add().dims.append(2**40), "has sparse_initializer"),
        (lambda model: model.training_info.add().algorithm.SetInParent(), "has training_info"),
    ],
)
def test_models_that_nothing_here_reads(tmp_path: Path, edit: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = linear_model()
    edit(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TeacherError, match=message) as caught:
        read_onnx(tmp_path / "model.onnx")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", [2**40, 2**27])
def test_images_and_outputs_without_bound_are_refused(tmp_path: Path, size: int) -> None:
    for changes in (
        {"inputs": [("images", FLOAT, ["N", 3, size, 1])]},
        {"outputs": [("logits", FLOAT, ["N", 2 * size + 1])]},
    ):
        with pytest.raises(TeacherError, match="more than 268435456 values for an image"):
            read(tmp_path, **changes)


@pytest.mark.parametrize("text", [b"images", b"weight", b"MatMul", b"linear"])
def test_text_that_is_not_utf_8(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear_model().SerializeToString().replace(text, b"\xff" * len(text)))
    with pytest.raises(TeacherError, match=r"its \w+Proto.\w+ is not UTF-8"):
        read_onnx(path)
