"""A pickle is a program; here it is read like any other data, and nothing in it is run."""

import io
import operator
import os
import pickle
import tracemalloc
from hashlib import md5

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from kd_pipeline.data.sources.pixels import safe_pickle
from kd_pipeline.data.sources.pixels.safe_pickle import Call, read_pickle
from kd_pipeline.errors import DataError
from tests.cifar_files import meta, pickled

NUMPY = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
BATCH = {b"data": np.zeros((1, 300), np.uint8), b"labels": [1, 300, 70000], b"names": [b"x" * 300]}


def read(data, functions=NUMPY):
    return read_pickle(io.BytesIO(data), "here", functions=functions)


def refusal(data, functions=NUMPY):
    with pytest.raises(DataError) as info:
        read(data, functions)
    assert str(info.value).startswith("here: not a Python 2 pickle of plain values (")
    return str(info.value)


def test_pickled_writes_what_python_2_wrote():
    assert md5(pickled(meta())).hexdigest() == CIFAR10.meta["md5"]


def test_reads_plain_values_as_pickle_does():
    number = {b"a": 0, b"b": 255, b"c": 256, b"d": 65535, b"e": 65536, b"f": -1, b"g": 2**31 - 1}
    value = {b"numbers": number, b"long": list(range(2500)), b"texts": [b"", b"x" * 255, b"y" * 256], b"none": []}
    data = pickled(value)
    assert read(data) == pickle.loads(data, encoding="bytes") == value


@pytest.mark.parametrize("value", [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], 2**40])
def test_reads_every_kind_of_plain_value(value):
    assert read(pickle.dumps([value, value, [value]], protocol=2)) == [value, value, [value]]


def test_repeated_value_is_read_as_one():
    shared = [1]
    first, second = read(pickle.dumps([shared, shared], protocol=2))
    assert first is second
    many = [[number] for number in range(300)]  # more than one byte can count
    read_many = read(pickle.dumps(many + many, protocol=2))
    assert read_many == many + many and all(map(operator.is_, read_many[:300], read_many[300:]))


def test_array_is_read_as_calls():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(100, axis=1)
    data = pickled({b"data": pixels})
    np.testing.assert_array_equal(pickle.loads(data, encoding="latin1")["data"], pixels)
    (array,) = read(data).values()
    assert type(array) is Call and array.arguments == (Call, (0,), b"b")
    version, shape, dtype, is_fortran, content = array.state
    assert (version, shape, is_fortran, content) == (1, (2, 300), False, bytes(pixels))
    assert (dtype.arguments, dtype.state) == ((b"u1", 0, 1), (3, b"|", None, None, None, -1, -1, 0))


# What is refused


def traps(marker):
    """Pickles that make a folder when Python reads them, each by different opcodes."""
    path = f"S{str(marker)!r}\n".encode()
    setter = b"csubprocess\nPopen\n)\x81"  # __new__ alone
    return {
        "reduce": b"\x80\x02cos\nmkdir\n" + path + b"\x85R.",
        "protocol 0": b"cos\nmkdir\n(" + path + b"tR.",
        "inst": b"(" + path + b"ios\nmkdir\n.",
        "obj": b"(cos\nmkdir\n" + path + b"o.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + path + b"\x85R.",
        "numpy's way round": b"\x80\x02cnumpy.f2py.capi_maps\ngetinit\n.",
        "newobj": b"\x80\x02" + setter + b".",
        "build": b"\x80\x02" + setter + b"}" + path + b"K\x01sb.",
        "persistent": b"\x80\x02Pthat\n.",
        "extension": b"\x80\x02\x82\x01.",
    }


@pytest.fixture(params=["both gates", "find_class alone"])
def gates(request, monkeypatch):
    """The unpickler refuses every function even if the check of the opcodes were gone."""
    if request.param == "find_class alone":
        monkeypatch.setattr(safe_pickle, "_check", lambda data: None)


@pytest.mark.parametrize("name", traps("x"))
def test_trap_is_refused_and_runs_nothing(tmp_path, gates, name):
    marker = tmp_path / "owned"
    data = traps(marker)[name]
    refusal(data)
    refusal(pickled({b"labels": []})[:-2] + b"U\x01x" + data[2 if data[0] == 0x80 else 0 : -1] + b"u.")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["reduce", "protocol 0", "inst", "obj", "stack global"])
def test_traps_work_where_pickles_are_executed(tmp_path, name):
    pickle.loads(traps(tmp_path / "owned")[name])
    assert (tmp_path / "owned").exists()


def test_allowed_functions_are_never_called(tmp_path, gates):
    path = str(tmp_path / "owned").encode()
    data = b"\x80\x02cos\nmkdir\nU%c" % len(path) + path + b"\x85R}b."
    call = read(data, {("os", "mkdir")})
    assert type(call) is Call and (call.arguments, call.state) == ((path,), {})
    assert "it names 'os mkdir', which no such file needs" in refusal(data)
    assert "it names 'numpy ndarray.tofile'" in refusal(b"\x80\x02cnumpy\nndarray.tofile\n.")
    assert os.listdir(tmp_path) == []


def test_state_for_anything_but_a_call_is_refused(gates):
    before = dict(vars(Call))
    for value in (b"]", b"}", b")", b"K\x01", b"U\x01x", b"cnumpy\ndtype\n"):
        for state in (b"}", b"}U\x09argumentsK\x01s", b"N}U\x09argumentsK\x01s\x86"):
            refusal(b"\x80\x02" + value + state + b"b.")
    assert dict(vars(Call)) == before


OPCODES = ["INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "PERSID", "BINPERSID", "EXT1", "EXT4", "NEXT_BUFFER"]


@pytest.mark.parametrize("name", OPCODES)
def test_opcode_beyond_plain_values_is_refused_by_name(name):
    data = b"\x80\x02" + getattr(pickle, name) + b"1\n1\n."
    assert f"it has the opcode {name}, which no such file needs" in refusal(data)


def test_truncated_pickle_is_refused():
    data = pickled(BATCH)
    for size in range(len(data)):
        refusal(data[:size])
    assert "pickle exhausted before seeing STOP" in refusal(data[:-1]) and read(data)


def test_damaged_pickle_is_read_or_refused():
    data = pickled(BATCH)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        try:
            read(bytes(damaged))
        except DataError:
            refused += 1
    assert 100 < refused < 2900


@pytest.mark.slow
def test_deep_nesting_is_read_or_refused():
    deep = b"N" + 10**5 * b"\x85"
    assert "it has 100000 tuples" in refusal(b"\x80\x02" + deep + b".")
    assert "it has 100000 tuples" in refusal(b"\x80\x02}" + deep + b"Ns.")  # its hash would crash Python
    doubling = b"N" + b"".join(b"q%ch%c\x86" % (number, number) for number in range(1, 60))
    assert "it has 59 tuples" in refusal(b"\x80\x02}" + doubling + b"Ns.")  # its hash would take 2**59 steps
    refusal(b"\x80\x02}]Ns.")
    read(b"\x80\x02" + 10**5 * b"](" + b"N" + 10**5 * b"e" + b".")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "it counts to 2147483647 at its memo 1"),
        (b"\x80\x02T\xff\xff\xff\x7fx.", "expected 2147483647 bytes in a string4, but only 2 remain"),
        (b"\x80\x02" + 10**6 * b"N", "it is larger than 100000 bytes"),
    ],
)
def test_memory_bomb_is_refused(monkeypatch, data, words):
    monkeypatch.setattr(safe_pickle, "_MAX_BYTES", 10**5)
    tracemalloc.start()
    message = refusal(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words in message and most < 2**20


def test_pickle_without_a_value_is_refused():
    refusal(b"\x80\x02.")
    refusal(b"")


def test_largest_batch_is_read():
    names = [b"%06d" % number for number in range(50_000)]
    content = {b"fine_labels": [7] * 50_000, b"coarse_labels": [300] * 50_000, b"filenames": names}
    assert read(pickled(content)) == content


def test_endless_pickle_is_refused(monkeypatch):
    """Each byte puts an object onto the stack."""
    monkeypatch.setattr(safe_pickle, "_MAX_OPCODES", 1000)
    for opcode in (b"N", b"]", b"}", b"("):
        tracemalloc.start()
        assert "it has more than 1000 opcodes" in refusal(b"\x80\x02" + opcode * 10**6 + b".")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 2**22  # mostly the pickle itself
    assert len(read(b"\x80\x02](" + b"N" * 990 + b"e.")) == 990


def test_keys_of_one_hash_are_refused():
    """A dict with n of them takes n * n steps."""
    numbers = [number * (2**61 - 1) for number in range(1001)]
    assert len(set(map(hash, numbers))) < 3
    keys = [b"\x8a\x0c" + number.to_bytes(12, "little") + b"N" for number in numbers]
    assert "it has 1001 integers of unlimited size" in refusal(b"\x80\x02}(" + b"".join(keys) + b"u.")
    assert len(read(b"\x80\x02}(" + b"".join(keys[:1000]) + b"u.")) == 1000
