"""Read a Python 2 pickle of plain values without executing it."""

import pickle  # for the codes of its instructions alone
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any

from kd_pipeline.errors import DataError

__all__ = ["Call", "read_pickle"]


@dataclass(slots=True)
class Call:
    """A call that a pickle asks for; it is only written down."""

    function: Any
    """Module and name with a space between, such as `numpy dtype`."""
    arguments: Any
    state: Any = None
    """What the result's `__setstate__` should get."""


def read_pickle(file: IO[bytes], name: str, *, functions: Collection[str]) -> Any:
    """The value in a pickle of protocol 2: dicts, lists, tuples, numbers, bytes for Python 2's texts, and `Call`s.

    A pickle is a program for a small stack machine. Here it can do no more than build such values: nothing is
    imported, called or given attributes, whatever the file says.

    Args:
        file: read up to the end of the pickle.
        name: the file as messages name it.
        functions: what the pickle may ask for, as `Call.function` spells it.

    Raises:
        DataError: the file is cut off, is no such pickle, or asks for something that is not among `functions`.
    """
    try:
        return _run(file, functions)
    except (AttributeError, IndexError, KeyError, ValueError) as exc:
        reason = str(exc) if isinstance(exc, ValueError) else "its instructions do not fit together"
        raise DataError(f"{name}: not a whole Python 2 pickle of plain values ({reason}); get the file again") from exc


def _run(file: IO[bytes], functions: Collection[str]) -> Any:
    """The stack machine. Every value on its stack is of a type that is made here, so no method of others can be met."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}
    while True:
        match _exactly(file, 1):
            case pickle.PROTO:
                _number(file, 1)
            case pickle.STOP:
                (value,) = stack
                return value
            case code if code in _VALUES:
                stack.append(_VALUES[code](file))
            case pickle.BINPUT:
                memo[_number(file, 1)] = stack[-1]
            case pickle.LONG_BINPUT:
                memo[_number(file, 4)] = stack[-1]
            case pickle.BINGET:
                stack.append(memo[_number(file, 1)])
            case pickle.LONG_BINGET:
                stack.append(memo[_number(file, 4)])
            case pickle.MARK:
                below.append(stack)
                stack = []
            case pickle.APPEND:
                item = stack.pop()
                stack[-1].append(item)
            case pickle.APPENDS:
                items, stack = stack, below.pop()
                stack[-1].extend(items)
            case pickle.SETITEM:
                item, key = stack.pop(), stack.pop()
                stack[-1].update(_items([key, item]))
            case pickle.SETITEMS:
                items, stack = stack, below.pop()
                stack[-1].update(_items(items))
            case (pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3) as code:
                size = 1 + [pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3].index(code)
                stack[-size:] = [tuple(stack[-size:])]
            case pickle.TUPLE:
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case pickle.GLOBAL:
                stack.append(_function(file, functions))
            case pickle.REDUCE:
                arguments, function = stack.pop(), stack.pop()
                stack.append(Call(function, arguments))
            case pickle.BUILD:
                state = stack.pop()
                if not isinstance(stack[-1], Call):
                    raise ValueError("it gives a state to a plain value")
                stack[-1].state = state
            case code:
                raise ValueError(f"it has the instruction {code!r}, which no such file needs")


_VALUES: dict[bytes, Callable[[IO[bytes]], Any]] = {
    pickle.NONE: lambda _: None,
    pickle.NEWTRUE: lambda _: True,
    pickle.NEWFALSE: lambda _: False,
    pickle.EMPTY_LIST: lambda _: [],
    pickle.EMPTY_DICT: lambda _: {},
    pickle.EMPTY_TUPLE: lambda _: (),
    pickle.BININT1: lambda file: _number(file, 1),
    pickle.BININT2: lambda file: _number(file, 2),
    pickle.BININT: lambda file: _number(file, 4, signed=True),
    pickle.LONG1: lambda file: _number(file, _number(file, 1), signed=True),
    pickle.SHORT_BINSTRING: lambda file: _exactly(file, _number(file, 1)),
    pickle.BINSTRING: lambda file: _exactly(file, _number(file, 4)),
}
"""What the instructions that need nothing else put on the stack."""


def _items(items: list[Any]) -> dict[bytes, Any]:
    """Keys and values in turn; a key of another kind could be nested so deeply that Python crashes on its hash."""
    if not all(isinstance(key, bytes) for key in items[::2]):
        raise ValueError("it has a key that is not a text")
    return dict(zip(items[::2], items[1::2], strict=True))


def _exactly(file: IO[bytes], num_bytes: int) -> bytes:
    found = file.read(num_bytes)
    if len(found) < num_bytes:
        raise ValueError("it ends too early")
    return found


def _number(file: IO[bytes], num_bytes: int, *, signed: bool = False) -> int:
    return int.from_bytes(_exactly(file, num_bytes), "little", signed=signed)


def _function(file: IO[bytes], functions: Collection[str]) -> str:
    name = " ".join(file.readline(200).decode("latin-1").removesuffix("\n") for _ in range(2))
    if name not in functions:
        raise ValueError(f"it asks for {name!r:.60}, which no such file needs")
    return name
