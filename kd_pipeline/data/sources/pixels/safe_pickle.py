"""Load a Python 2 pickle of plain values without running anything in it."""

import io
import pickle
import pickletools
from collections.abc import Collection
from typing import IO, Any

from kd_pipeline.errors import DataError

__all__ = ["Call", "read_pickle"]

_OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "BININT",
    "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "REDUCE", "BUILD",
})  # fmt: skip
"""What Python 2's cPickle writes for plain values and NumPy arrays with protocol 2."""
_MAX_BYTES = 160 * 2**20
"""The largest file of CIFAR has 155 million."""
_MAX_OPCODES = 2**20
"""A batch of CIFAR takes some 200,000. Each may put an object of 64 bytes onto the unpickler's stack."""
_MAX_LONGS = 1000
"""An array takes none. As keys of a dict, many that have the same hash take forever."""
_MAX_TUPLES = 20
"""An array takes five. Tuples can be dict keys, and hashing deeply nested ones takes forever or crashes Python."""


class Call:
    """What every function that a pickle may name is replaced with: keeps the arguments and the state, runs nothing."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, functions: Collection[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._functions = functions

    def find_class(self, module_name: str, global_name: str) -> type[Call]:
        """`Call`, whatever the function is; nothing is imported."""
        if (module_name, global_name) not in self._functions:
            name = f"{module_name} {global_name}"
            raise pickle.UnpicklingError(f"it names {name!r:.60}, which no such file needs")
        return Call


def read_pickle(file: IO[bytes], name: str, *, functions: Collection[tuple[str, str]]) -> Any:
    """The value in a pickle of protocol 2: dicts, lists, tuples, numbers, bytes for Python 2's `str`, and `Call`s.

    Args:
        file: read to its end, at most 160 MiB of 1,048,576 opcodes.
        name: the file's name for messages.
        functions: module and name of each function that the pickle may name. It gets a `Call` in place of the result.

    Raises:
        DataError: the file is too large, cut off, no such pickle, or names a function that is not among `functions`.
        OSError: the file cannot be read.
    """
    data = file.read(_MAX_BYTES + 1)
    try:
        _check(data)
        return _Unpickler(data, functions).load()
    except Exception as exc:  # the pickle module raises a dozen kinds of errors on damaged data
        raise DataError(f"{name}: not a Python 2 pickle of plain values ({exc}); get the file again") from exc


def _check(data: bytes) -> None:
    """Refuse what no such file needs and could make the unpickler crash or exhaust the memory."""
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
    num_tuples = num_memos = num_longs = 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == _MAX_OPCODES:
            raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")
        if opcode.name not in _OPCODES:
            raise ValueError(f"it has the opcode {opcode.name}, which no such file needs")
        num_tuples += opcode.name.startswith("TUPLE")
        num_longs += opcode.name == "LONG1"
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            num_memos += 1
            if argument is None or argument > num_memos:  # the unpickler would allocate a table of that size
                raise ValueError(f"it counts to {argument} at its memo {num_memos}")
    if num_tuples > _MAX_TUPLES:
        raise ValueError(f"it has {num_tuples} tuples")
    if num_longs > _MAX_LONGS:
        raise ValueError(f"it has {num_longs} integers of unlimited size")
