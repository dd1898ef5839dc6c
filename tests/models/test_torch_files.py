"""Small files that would take all memory or crash the process, if torch simply read them."""

import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.models import checkpoints, torch_files
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.models.weights import Checkpoint
from kd_pipeline.training.checkpoint import load_checkpoint

MIB = 2**20
LEGACY_START = b"".join(
    pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
)


def name(module: str, function: str) -> bytes:
    return f"c{module}\n{function}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    digits = pickle.encode_long(value)
    return b"\x8a" + bytes([len(digits)]) + digits


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(numel: int, kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text("0") + text("cpu") + number(numel) + b"tQ"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def tensor(numel: int, size: int, stride: int) -> bytes:
    hooks = call(name("collections", "OrderedDict"))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(numel), number(0), numbers(size), numbers(stride), b"\x89", hooks)


def state(value: bytes) -> bytes:
    """The pickle of `{"fc.weight": value}`."""
    return b"\x80\x02}" + text("fc.weight") + value + b"s."


def write(path: Path, content: bytes, *, kind: str = "zip", compress: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    if kind == "legacy":
        path.write_bytes(LEGACY_START + content + pickle.dumps([], protocol=2))
        return path
    with zipfile.ZipFile(path, "w", compress) as archive:
        records = {"data.pkl": content, "byteorder": b"little", "data/0": bytes(24), "version": b"3\n", **more}
        for record, data in records.items():
            archive.writestr(f"archive/{record}", data)
    return path


FORGED = {
    "bytes": call(name("__builtin__", "bytearray"), number(2**40)),
    "bytes by a subclass": call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("__builtin__", "bytearray"),
        name("torch", "Tensor"),
        numbers(2**40),
        b"}",
    ),
    "a tensor": call(name("torch", "FloatTensor"), number(2**40)),
    "a storage": call(name("torch.storage", "UntypedStorage"), number(2**40)),
    "a codec": call(name("_codecs", "encode"), text("a" * 99), text("hex")),
    "nested": call(name("torch._utils", "_rebuild_nested_tensor"), *[tensor(6, 6, 1)] * 4),
    "a view": tensor(6, 2**40, 0),
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("value", FORGED.values(), ids=FORGED.keys())
def test_calls_that_take_memory_by_a_number_are_refused(tmp_path: Path, value: bytes, kind: str) -> None:
    path = write(tmp_path / "a.pt", state(value), kind=kind)
    with pytest.raises(ConfigError, match=r"a\.pt is not loaded: it calls \S+ in a way that torch\.save never does"):
        read_checkpoint(path)
    if kind == "zip":
        with pytest.raises(StateError, match=r"a\.pt cannot be loaded: it calls \S+ in a way"):
            load_checkpoint(path)


CLAIMED = {
    "storage": (tensor(2**20, 2**20, 1), "storage 0 should have 4194304 bytes, and has 24"),
    "storage of another kind": (
        call(name("torch._utils", "_rebuild_tensor_v2"), storage(6, "DoubleStorage"), numbers(6), numbers(1)),
        "storage 0 should have 48 bytes, and has 24",
    ),
    "size": (tensor(6, 2**20, 1), "is cut off, damaged or not a file of torch.save"),
    "stride": (tensor(6, 2, -5), "is cut off, damaged or not a file of torch.save"),
    "long number": (b"\x8a", "is cut off or damaged"),
}


@pytest.mark.parametrize(("value", "message"), CLAIMED.values(), ids=CLAIMED.keys())
def test_tensors_outside_their_storage_are_refused(tmp_path: Path, value: bytes, message: str) -> None:
    path = write(tmp_path / "a.pt", state(value))
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(path)
    with pytest.raises(StateError, match="it is truncated, damaged or not a checkpoint"):
        load_checkpoint(path)


DEEP = {
    "tuples": (b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", "it has more than 100 tuples in each other"),
    "a tuple for each of two": (
        b"\x80\x02}K\x01q\x00" + b"h\x00\x86q\x00" * 70 + b"K\x01s.",
        "it has more than 256 MiB of values beside the tensors",
    ),
}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(("content", "message"), DEEP.values(), ids=DEEP.keys())
def test_keys_that_cannot_be_hashed_are_refused(tmp_path: Path, content: bytes, message: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(write(tmp_path / "a.pt", content, kind=kind))


@pytest.mark.slow
def test_the_keys_are_real(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", DEEP["tuples"][0])
    code = f"import torch; torch.load({str(path)!r}, weights_only=True)"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True).returncode == -11


@pytest.mark.parametrize(
    "opcode", [b"]", b"}", b"\x8f", b"K\x01", b")"], ids=["lists", "dicts", "sets", "ints", "tuples"]
)
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_many_values_are_refused(tmp_path: Path, opcode: bytes, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_files, "_MAX_COST", MIB)
    path = write(tmp_path / "a.pt", b"\x80\x02](" + opcode * 20_000 + b"e.", kind=kind)
    with pytest.raises(ConfigError, match="it has more than 1 MiB of values beside the tensors"):
        read_checkpoint(path)


def test_repeated_calls_with_one_value_are_counted(tmp_path: Path) -> None:
    copies = (name("_codecs", "encode") + b"q\x02" + text("a" * MIB) + b"q\x00" + text("latin1") + b"q\x01\x86R"
              + b"h\x02h\x00h\x01\x86R" * 300)  # fmt: skip
    with pytest.raises(ConfigError, match="it has more than 256 MiB of values beside the tensors"):
        read_checkpoint(write(tmp_path / "a.pt", b"\x80\x02](" + copies + b"e."))


def test_many_sets_and_long_names_are_not_searched(tmp_path: Path) -> None:
    shared = {str(number): 1 for number in range(3000)}
    for _ in range(4):
        shared = {str(number): shared for number in range(300)}
    torch.save({"model": shared, "a." * 500_000: torch.ones(1), "\x1b[2J": 1}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"holds a mapping of model, (a\.){20}, \\x1b\[2J, and no state dict"):
        Checkpoint(tmp_path / "a.pt")


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", state(tensor(6, 6, 1)), compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConfigError, match=r"it is a compressed archive, which torch\.save never writes"):
        read_checkpoint(path)
    with pytest.raises(StateError, match=r"it is a compressed archive, which torch\.save never writes"):
        load_checkpoint(path)


def forged_archive(change: Callable[[bytearray, list[int]], None], tmp_path: Path) -> Path:
    """An archive with `change` made to its bytes, given the places of the records in the central directory."""
    path = write(tmp_path / "a.pt", state(tensor(6, 6, 1)))
    content = bytearray(path.read_bytes())
    places, place = [], content.find(b"PK\1\2")
    while place >= 0:
        places.append(place)
        place = content.find(b"PK\1\2", place + 4)
    change(content, places)
    path.write_bytes(content)
    return path


def at_one_place(content: bytearray, places: list[int]) -> None:
    """The last record gets the size of the whole file."""
    content[places[-1] + 20 : places[-1] + 28] = struct.pack("<II", len(content), len(content))


def with_a_prefix(content: bytearray, _places: list[int]) -> None:
    content[:0] = b"PK\3\4" + bytes(60)


@pytest.mark.parametrize("change", [at_one_place, with_a_prefix])
def test_archives_that_torch_reads_differently_are_refused(
    tmp_path: Path, change: Callable[[bytearray, list[int]], None]
) -> None:
    with pytest.raises(ConfigError, match=r"records in the same place, as torch\.save never writes"):
        read_checkpoint(forged_archive(change, tmp_path))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", state(tensor(6, 6, 1)), **{"DATA.PKL": state(FORGED["bytes"])})
    with pytest.raises(ConfigError, match=r"it has two records of the same name, as torch\.save never writes"):
        read_checkpoint(path)


def sparse(path: Path, start: bytes, size: int, end: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
        file.seek(0, 2)
        file.write(end)
    return path


END_OF_ARCHIVE = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 200, 100, 0)
SPARSE = {
    "larger than the memory": (b"PK\3\4", 2**42, b"", "it has 4398046511104 bytes, and at most"),
    "a directory": (b"PK\3\4", 2**32 - 100, END_OF_ARCHIVE, "it has 4294967096 bytes in one piece"),
    "a text": (b"\x80\2X\xff\xff\xff\xff", 2**33, b"", "it has 4294967295 bytes in one piece"),
    "a name": (b"\x80\2c", 2**33, b"", "it is cut off or damaged"),
    "a header": (struct.pack("<Q", 90_000_000) + b"{", 2**33, b"", "with a header of 90000000 bytes"),
    "a tar archive": (b"\0" * 257 + b"ustar", 2**33, b"", "is not a file of torch.save"),
}


@pytest.mark.parametrize(("start", "size", "end", "message"), SPARSE.values(), ids=SPARSE.keys())
def test_large_sparse_files_are_refused(tmp_path: Path, start: bytes, size: int, end: bytes, message: str) -> None:
    path = sparse(tmp_path / "a.pt", start, size, end)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(path)
    with pytest.raises(StateError, match=r"a\.pt cannot be loaded: "):
        load_checkpoint(path)


HEADERS = {
    "size": b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    "overflow": b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}',
    "depth": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "negative": b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_headers_of_safetensors_that_claim_too_much_are_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConfigError, match="it is a safetensors file that is cut off or damaged"):
        read_checkpoint(tmp_path / "a.pt")


def test_the_open_file_is_read_whatever_is_at_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(3)}, path)
    check = checkpoints._check_kind

    def swap(path: Path, *arguments: Any) -> None:
        check(path, *arguments)
        save_file({"w": torch.zeros(3)}, path.with_name("b"))
        path.with_name("b").replace(path)

    monkeypatch.setattr(checkpoints, "_check_kind", swap)
    assert read_checkpoint(path)["w"].tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_saves_is_loaded(tmp_path: Path, is_zip: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": net.state_dict(),
        "parameter": net[0].weight,
        "optimizer": optimizer.state_dict(),
        "dtypes": [torch.ones(2, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.bool, torch.uint8)],
        "view": torch.ones(1).expand(1000, 1000),
        "bytes": [b"abc", bytearray(b"abc"), bytearray()],
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "shared": [net[0].weight.data[:2], net[0].weight.data[2:]],
    }
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(path)
    assert found.keys() == content.keys()
    assert found["view"].shape == (1000, 1000) and found["bytes"] == content["bytes"]
    assert all(torch.equal(found["state_dict"][key], value) for key, value in content["state_dict"].items())
    if is_zip:
        assert load_checkpoint(path)["bytes"] == content["bytes"]


@pytest.mark.slow
def test_no_refusal_takes_much_memory(tmp_path: Path) -> None:
    write(tmp_path / "sets.pt", b"\x80\x02](" + b"\x8f" * 5_000_000 + b"e.")
    write(tmp_path / "text.pt", state(text("a" * 60 * MIB)))
    sparse(tmp_path / "name.pt", b"\x80\2c", 2**33)
    script = f"""
import resource
from pathlib import Path
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.weights import Checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in Path({str(tmp_path)!r}).iterdir():
    try:
        Checkpoint(path)
    except ConfigError:
        continue
    raise AssertionError(path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500
