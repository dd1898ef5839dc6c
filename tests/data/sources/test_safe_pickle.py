"""A pickle is a program; here it is read like any other data, and nothing it asks for happens."""

import io
import operator
import os
import pickle
from hashlib import md5

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from kd_pipeline.data.sources.safe_pickle import Call, read_pickle
from kd_pipeline.errors import DataError
from tests.cifar_files import meta, pickled

NUMPY = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")


def read(data, functions=NUMPY):
    return read_pickle(io.BytesIO(data), "here", functions=functions)


def refusal(data, functions=NUMPY):
    with pytest.raises(DataError) as info:
        read(data, functions)
    assert str(info.value).startswith("here: not a whole Python 2 pickle of plain values (")
    return str(info.value)


def test_the_pickles_of_these_tests_are_what_python_2_wrote():
    assert md5(pickled(meta())).hexdigest() == CIFAR10.meta["md5"]


def test_plain_values_are_read_as_python_reads_them():
    number = {b"a": 0, b"b": 255, b"c": 256, b"d": 65535, b"e": 65536, b"f": -1, b"g": 2**31 - 1}
    value = {b"numbers": number, b"long": list(range(2500)), b"texts": [b"", b"x" * 255, b"y" * 256], b"none": []}
    data = pickled(value)
    assert read(data) == pickle.loads(data, encoding="bytes") == value


@pytest.mark.parametrize("value", [None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], 2**40])
def test_every_kind_of_plain_value_is_read(value):
    assert read(pickle.dumps([value, value, [value]], protocol=2)) == [value, value, [value]]


def test_a_value_that_is_there_twice_is_read_as_one():
    shared = [1]
    first, second = read(pickle.dumps([shared, shared], protocol=2))
    assert first is second
    many = [[number] for number in range(300)]  # beyond what one byte can count
    read_many = read(pickle.dumps(many + many, protocol=2))
    assert read_many == many + many and all(map(operator.is_, read_many[:300], read_many[300:]))


def test_an_array_is_read_as_the_calls_that_would_make_it():
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(100, axis=1)
    data = pickled({b"data": pixels})
    np.testing.assert_array_equal(pickle.loads(data, encoding="latin1")["data"], pixels)
    (array,) = read(data).values()
    assert array == Call(
        "numpy.core.multiarray _reconstruct",
        ("numpy ndarray", (0,), b"b"),
        (1, (2, 300), Call("numpy dtype", (b"u1", 0, 1), (3, b"|", None, None, None, -1, -1, 0)), False, bytes(pixels)),
    )


# What is refused


def traps(marker):
    """Pickles that make a folder when Python reads them, each by other instructions."""
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


@pytest.mark.parametrize("name", traps("x"))
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, name):
    marker = tmp_path / "owned"
    data = traps(marker)[name]
    refusal(data)
    refusal(pickled({b"labels": []})[:-2] + b"U\x01x" + data[2 if data[0] == 0x80 else 0 : -1] + b"u.")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["reduce", "protocol 0", "inst", "obj", "stack global"])
def test_the_traps_work_where_pickles_are_executed(tmp_path, name):
    pickle.loads(traps(tmp_path / "owned")[name])
    assert (tmp_path / "owned").exists()


def test_functions_that_are_known_are_named_and_never_called(tmp_path):
    path = str(tmp_path / "owned").encode()
    data = b"\x80\x02cos\nmkdir\nU%c" % len(path) + path + b"\x85R}b."
    assert read(data, ["os mkdir"]) == Call("os mkdir", (path,), {})
    assert not (tmp_path / "owned").exists()
    assert "it asks for 'os mkdir', which no such file needs" in refusal(data)
    assert os.listdir(tmp_path) == []


def test_a_state_for_anything_but_a_call_is_refused():
    assert "it gives a state to a plain value" in refusal(b"\x80\x02]}b.")
    assert "it gives a state to a plain value" in refusal(b"\x80\x02cnumpy\ndtype\n}b.")


MIGHTY = ["INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "PERSID", "BINPERSID", "EXT1", "EXT4", "NEXT_BUFFER"]


@pytest.mark.parametrize("name", MIGHTY)
def test_an_instruction_that_could_do_more_than_build_plain_values_is_refused_by_name(name):
    code = getattr(pickle, name)
    assert f"it has the instruction {code!r}, which no such file needs" in refusal(b"\x80\x02" + code + b"1\n1\n.")


def test_a_pickle_that_is_cut_off_anywhere_is_refused():
    data = pickled({b"data": np.zeros((1, 300), np.uint8), b"labels": [1, 300, 70000], b"names": [b"x" * 300]})
    for size in range(len(data)):
        refusal(data[:size])
    assert "it ends too early" in refusal(data[:-1]) and read(data)


def test_a_damaged_pickle_is_read_or_refused_and_nothing_else():
    data = pickled({b"data": np.zeros((1, 300), np.uint8), b"labels": [1, 300, 70000], b"names": [b"x" * 300]})
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


def test_values_nested_beyond_all_measure_are_read_or_refused():
    deep = b"N" + 10**5 * b"\x85"
    read(b"\x80\x02" + deep + b".")
    for key in (deep, b"N", b"K\x01", b"]"):
        for end in (key + b"Ns", b"(" + key + b"Nu"):
            assert "it has a key that is not a text" in refusal(b"\x80\x02}" + end + b".")


def test_more_than_one_value_is_refused():
    refusal(b"\x80\x02NN.")
    refusal(b"\x80\x02.")
