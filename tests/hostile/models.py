"""Hostile ONNX files and TensorRT engines."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from kd_pipeline.errors import EngineError, TeacherError
from kd_pipeline.onnx.file import CLASSES_KEY, OUTPUTS_KEY, read_onnx
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from kd_pipeline.teachers.tensorrt.manifest import manifest_path, read_engine, write_manifest
from kd_pipeline.teachers.tensorrt.parity import load_reference, parity_path
from tests.hostile.cases import DEEP, Case, Kind, edit_json
from tests.hostile.prepare import BOMB
from tests.teachers.onnx_models import linear_model, write_external
from tests.teachers.tensorrt.test_manifest import CONTENT, MANIFEST


def open_on_cpu(path: Path) -> object:
    """Open the file as a teacher, in OpenVINO."""
    settings = TeacherSettings(onnx=path, backend="openvino", num_threads=1)
    return open_teacher(settings, image_shape=(3, 8, 8))


def onnx_cases() -> list[Case]:
    good = linear_model().SerializeToString()
    kind = Kind("onnx", read_onnx, TeacherError, file="model.onnx")
    kind.add_special()
    kind.add_bytes("empty", b"")
    kind.add_bytes("cut off", good[: len(good) // 2])
    kind.add_bytes("zeros", bytes(10**6))
    kind.add_bytes("length of 2**60", b"\x08\x0a\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x0f")
    kind.add_bytes("nested messages", nested_message(5000))
    kind.add_bytes("nested graphs", nested_graphs(40))
    names = {
        "nested class names": "[" * DEEP,
        "number of 5000 digits as a name": f"[{'9' * 5000}]",
        "long class name": json.dumps(["x" * 10**6]),
        "no class names": "[1, 2, 3, 4, 5]",
    }
    for name, text in names.items():
        kind.add_bytes(name, linear_model(metadata={CLASSES_KEY: text}).SerializeToString())

    prefixes = {
        "nested outputs": '{"logits": ' * DEEP,
        "prefix of 5000 digits": f'{{"logits": {"9" * 5000}}}',
        "prefix of a vector": '{"logits": 1}',
        "outputs that it does not have": json.dumps({"x\x1b]0;title\x07": 1}),
    }
    for name, text in prefixes.items():
        kind.add_bytes(name, linear_model(metadata={OUTPUTS_KEY: text}).SerializeToString())

    run = Kind("onnx in OpenVINO", open_on_cpu, TeacherError, file="model.onnx")

    def change(name: str, edit: Callable[[onnx.ModelProto], object], **about: Any) -> None:
        model = linear_model()
        edit(model)
        run.add_bytes(name, model.SerializeToString(), **about)

    change("weights that are missing", lambda model: model.graph.initializer[0].ClearField("raw_data"), names="")
    change("weights of 2**60", lambda model: model.graph.initializer[0].dims.__setitem__(0, 2**60))
    change("negative size of weights", lambda model: model.graph.initializer[0].dims.__setitem__(0, -3))
    change("unknown operator", lambda model: setattr(model.graph.node[3], "op_type", "Exec"))
    change("foreign domain", lambda model: setattr(model.graph.node[3], "domain", "evil"))
    change("opset 10**9", lambda model: setattr(model.opset_import[0], "version", 10**9))
    change("a cycle", lambda model: model.graph.node[0].input.__setitem__(0, "cast"))

    external = Kind("external weights", open_on_cpu, TeacherError, file="model.onnx")

    def refer(name: str, *entries: tuple[str, str], weights: Callable[[Path], object] | None = None) -> None:
        def edit(tensor: TensorProto) -> None:
            del tensor.external_data[:]
            for key, value in entries:
                tensor.external_data.add(key=key, value=value)

        def write(path: Path) -> None:
            write_external(path.parent, edit)
            (path.parent / "other.bin").write_bytes(bytes(60))
            if weights is not None:
                weights(path.parent)

        external.add(name, write)

    def in_memory(folder: Path) -> None:
        (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
        (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(8192))

    memory = ("location", "*/_ORT_MEM_ADDR_/*")
    whole = (("offset", "0"), ("length", "60"))
    refer("at an address of the process", memory, ("offset", "4096"), ("length", "60"), weights=in_memory)
    refer("at two places", ("location", "weights.bin"), *whole, ("location", "other.bin"))
    refer("at no place", *whole)
    refer("at an absolute place", ("location", "/etc/passwd"), *whole)
    refer("above the folder", ("location", "../weights.bin"), *whole)
    refer("in the folder itself", ("location", "."), *whole)
    refer("with a NUL", ("location", "weights.bin\0x"), *whole)
    refer("in a missing file", ("location", "missing.bin"), *whole)
    refer("with the file's own name", ("location", "model.onnx"), ("offset", "100000"), ("length", "60"))
    for name, offset, length in (
        ("beyond the file", "56", "60"),
        ("at a negative offset", "-8", "60"),
        ("with a negative length", "0", "-60"),
        ("too long", "0", str(2**62)),
        ("too short", "0", "4"),
        ("at no number", "zero", "60"),
        ("at 5000 digits", "9" * 5000, "60"),
    ):
        refer(name, ("location", "weights.bin"), ("offset", offset), ("length", length))

    def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def replace(folder: Path) -> None:
            (folder / "weights.bin").unlink()
            make(folder / "weights.bin")

        return replace

    place = ("location", "weights.bin")
    refer("in a pipe", place, *whole, weights=replaced(os.mkfifo))
    refer("in an endless device", place, *whole, weights=replaced(lambda path: path.symlink_to("/dev/zero")))
    refer("in a link out", place, *whole, weights=replaced(lambda path: path.symlink_to("/etc/passwd")))
    return [*kind.cases, *run.cases, *external.cases]


def nested_message(levels: int) -> bytes:
    """Field 7 in field 7, and so on, with lengths that fit."""
    content = b""
    for _ in range(levels):
        content = b"\x3a" + varint(len(content)) + content
    return content


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def nested_graphs(levels: int) -> bytes:
    """A graph in a node of a graph, and so on."""
    model = linear_model()
    graph = model.graph
    for _ in range(levels):
        inner = helper.make_graph([helper.make_node("Identity", ["images"], ["x"])], "inner", [], [])
        node = graph.node.add(op_type="If", input=["images"], output=["y"])
        attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        attribute.g.CopyFrom(inner)
        graph = attribute.g
    return model.SerializeToString()


def engine_cases(made: Path) -> list[Case]:
    def around(folder: Path) -> None:
        (folder / "model.engine").write_bytes(CONTENT)
        write_manifest(folder / "model.engine", MANIFEST)

    engine = Kind("engine", read_engine, EngineError, file="model.engine", around=around)
    engine.add_special()
    engine.add_bytes("empty", b"")
    engine.add_bytes("another one", b"another engine")
    engine.add("that the group may write", lambda path: path.write_bytes(CONTENT) and path.chmod(0o664))
    engine.add("that others may write", lambda path: path.write_bytes(CONTENT) and path.chmod(0o646))
    engine.add("without a manifest", lambda path: path.write_bytes(CONTENT) and manifest_path(path).unlink())
    if os.geteuid() == 0:
        engine.add("of another user", lambda path: path.write_bytes(CONTENT) and os.chown(path, 12345, 12345))
    engine.add("by a link", lambda path: (path.with_name("real").write_bytes(CONTENT), path.symlink_to("real")))

    manifest = Kind(
        "manifest of an engine", read_engine, EngineError, file="model.engine.json", around=around,
        target="model.engine",
    )  # fmt: skip
    manifest.add_special()
    manifest.add_nested_json("input_adapter", "seal")
    manifest.add_bytes("number of 5000 digits", f'{{"engine_bytes": {"9" * 5000}}}'.encode())
    manifest.add_bytes("list", b"[]")
    manifest.add_bytes("not UTF-8", b'{"\xff": 1}')

    def change(name: str, **values: Any) -> None:
        def write(path: Path) -> None:
            around(path.parent)
            edit_json(path, lambda content: content.update(values))

        manifest.add(name, write)

    change("without a seal", seal={})
    change("text of 1 MB in place of a number", engine_bytes="x" * 10**6)
    change("changed by hand", gpu="other")
    change("escapes in the command", command="\x1b]0;title\x07; rm -rf ~\nkd-pipeline: all is well", gpu="other")
    change("nested adapter", input_adapter={"a": [[[[[1]]]]]})
    change("many unknown keys", **{f"k{number}": 1 for number in range(10_000)})
    for name, make in (("that the group may write", 0o664), ("that others may write", 0o646)):

        def loosen(path: Path, mode: int = make) -> None:
            around(path.parent)
            path.chmod(mode)

        manifest.add(name, loosen)

    def read_reference(path: Path) -> object:
        content = parity_path(path).stat()
        digest = "0" * 64
        if content.st_size < 10**9:
            digest = hashlib.sha256(parity_path(path).read_bytes()).hexdigest()
        return load_reference(path, MANIFEST.parity.model_copy(update={"tensors_sha256": digest}))

    def read_special(path: Path) -> object:
        return load_reference(path, MANIFEST.parity)

    name = parity_path(Path("model.engine")).name
    parity = Kind("parity images", read_reference, EngineError, file=name, around=around, target="model.engine")
    empty = io.BytesIO()
    np.savez(empty, other=np.zeros(3))
    parity.add_bytes("are no archive", b"images")
    parity.add_bytes("are missing", empty.getvalue())
    parity.add("bomb", lambda path: os.link(made / f"{BOMB}.npz", path))
    special = Kind("parity images", read_special, EngineError, file=name, around=around, target="model.engine")
    special.add_special()
    return [*engine.cases, *manifest.cases, *parity.cases, *special.cases]


def cases(made: Path) -> list[Case]:
    return [*onnx_cases(), *engine_cases(made)]
