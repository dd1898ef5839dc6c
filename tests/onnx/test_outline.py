import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx import outline
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.onnx.outline import OutlineError, read_outline
from tests.teachers.onnx_models import linear_model

LARGE = 3000
GRAPH, INITIALIZER, NODE = 7, 5, 1
"""Numbers of fields."""


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def sized(number: int, size: int) -> bytes:
    """The start of a field with `size` bytes."""
    return varint(number << 3 | 2) + varint(size)


def nested(depth: int) -> bytes:
    """A model of graphs in one another."""
    graph = sized(NODE, 0)
    for _ in range(depth):
        attribute = sized(6, len(graph)) + graph
        node = sized(5, len(attribute)) + attribute
        graph = sized(NODE, len(node)) + node
    return sized(GRAPH, len(graph)) + graph


def write_sparse(path: Path, size: int, start: bytes = b"") -> Path:
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


@pytest.fixture
def large() -> onnx.ModelProto:
    """Large tensors in each way that ONNX stores them, and a small one."""
    model = linear_model()
    floats = np.arange(LARGE, dtype=np.float32)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(floats, "raw"),
            helper.make_tensor("floats", TensorProto.FLOAT, [LARGE], floats),
            helper.make_tensor("doubles", TensorProto.DOUBLE, [LARGE], floats),
            helper.make_tensor("int64", TensorProto.INT64, [LARGE], np.arange(LARGE) - 7),
            helper.make_tensor("half", TensorProto.FLOAT16, [LARGE], floats),
            helper.make_tensor("uint64", TensorProto.UINT64, [LARGE], np.arange(LARGE)),
        ]
    )
    return model


@pytest.mark.parametrize("unseen", [outline._MAX_UNSEEN, 0], ids=["small parts kept", "all parts seen"])
def test_an_outline_is_the_model_without_large_weights(
    large: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, unseen: int
) -> None:
    monkeypatch.setattr(outline, "_MAX_UNSEEN", unseen)
    content = large.SerializeToString()
    found = read_outline(io.BytesIO(content), len(content))
    assert found.sha256.hexdigest() == hashlib.sha256(content).hexdigest()
    whole = {tensor.name: tensor for tensor in large.graph.initializer}
    sizes = {}
    for tensor in found.model.graph.initializer:
        sizes[tensor.name] = found.sizes.get(tensor.raw_data)
        if sizes[tensor.name] is not None:
            tensor.CopyFrom(whole[tensor.name])
    assert found.model == large
    del sizes["weight"]  # small
    assert sizes == {
        "raw": ("raw_data", 4 * LARGE),
        "floats": ("float_data", LARGE),
        "doubles": ("double_data", LARGE),
        "int64": ("int64_data", LARGE),
        "half": ("int32_data", LARGE),
        "uint64": ("uint64_data", LARGE),
    }


def test_large_weights_of_any_kind_fit_their_shapes(tmp_path: Path, large: onnx.ModelProto) -> None:
    onnx.save(large, tmp_path / "model.onnx")
    assert read_onnx(tmp_path / "model.onnx").sha256 == hashlib.sha256(large.SerializeToString()).hexdigest()
    for tensor in large.graph.initializer:
        tensor.dims[0] += 1
        (tmp_path / "model.onnx").write_bytes(large.SerializeToString())
        with pytest.raises(TeacherError, match=f"the weights of '{tensor.name}' of the shape .* need .* and the file"):
            read_onnx(tmp_path / "model.onnx")
        tensor.dims[0] -= 1


def test_a_real_export_keeps_all_but_its_weights(exported: Callable[[int], Path]) -> None:
    content = exported(0).read_bytes()
    found = read_outline(io.BytesIO(content), len(content))
    assert found.sizes and found.model.ByteSize() < len(content)
    whole = onnx.load_model_from_string(content)
    for model in (found.model, whole):
        for tensor in model.graph.initializer:
            tensor.ClearField("raw_data")
    assert found.model == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 100, "starts no field of ModelProto"),
        (b"\x0b", "starts no value of ModelProto"),
        (sized(99, 0), "starts no field of ModelProto"),
        (b"\xff" * 20, "ends no number"),
        (sized(GRAPH, 50) + b"\x0a", "ModelProto ends after 3 bytes, and a part of it after 52"),
        (b"\x08", "ends within a field"),
        (nested(40), "MaxDepth"),
        (nested(3000), "101 messages in one another"),
    ],
    ids=["zeros", "group", "unknown field", "number", "cut off", "no value", "nested", "deeply nested"],
)
def test_what_is_no_model(content: bytes, message: str) -> None:
    with pytest.raises(OutlineError, match=message):
        read_outline(io.BytesIO(content), len(content))


def test_fields_of_a_later_onnx_are_refused() -> None:
    content = linear_model().SerializeToString()
    node = sized(NODE, 3) + sized(99, 0)  # in a small part, which only protobuf sees
    content += sized(GRAPH, len(node)) + node
    with pytest.raises(OutlineError, match=r"has fields that onnx .* does not know"):
        read_outline(io.BytesIO(content), len(content))


def test_a_file_that_changes_its_size_meanwhile_is_refused() -> None:
    content = linear_model().SerializeToString()
    for size, message in ((len(content) - 1, "ends after|ends within"), (len(content) + 1, "ends within a field")):
        with pytest.raises(OutlineError, match=message):
            read_outline(io.BytesIO(content), size)


def test_sparse_files_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"cannot be read: it has 1099511627776 bytes, and at most 2147483647 are"):
        read_onnx(write_sparse(tmp_path / "tib.onnx", 2**40))
    with pytest.raises(TeacherError, match="is not a readable ONNX file: byte 1 starts no field"):
        read_onnx(write_sparse(tmp_path / "zeros.onnx", 2**31 - 1))
    with pytest.raises(TeacherError, match="needs more than 64 MiB without its weights"):
        read_onnx(write_sparse(tmp_path / "producer.onnx", 2**31 - 1, sized(2, 2**31 - 7)))


@pytest.mark.slow
def test_no_file_takes_much_memory(tmp_path: Path) -> None:
    size, shape = 2**28, b"\x08\x02\x10\x01"
    tensor = shape + sized(9, size)
    initializer = sized(INITIALIZER, len(tensor) + size) + tensor
    weights = sized(GRAPH, len(initializer) + size) + initializer
    paths = [write_sparse(tmp_path / "weights.onnx", len(weights) + size, weights)]
    for name, part in (("nodes", sized(NODE, 0)), ("attributes", sized(NODE, 2) + sized(5, 0))):
        parts = part * (2**23 // len(part))  # protobuf needs 75 times as much
        paths.append(tmp_path / f"{name}.onnx")
        paths[-1].write_bytes(sized(GRAPH, len(parts)) + parts)
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import onnx\n"
        "from kd_pipeline.errors import TeacherError\n"
        "from kd_pipeline.onnx.file import read_onnx\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_onnx(Path(path))\n"
        "    except TeacherError: print('refused')\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, timeout=120, check=True
    )
    *refused, mebibytes = done.stdout.split()
    assert refused == ["refused"] * 3 and int(mebibytes) < 400
