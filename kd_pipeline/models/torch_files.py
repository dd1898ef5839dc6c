"""Find out what a file of `torch.save` would do to the process that loads it, before torch reads it."""

import io
import math
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple

__all__ = ["DamagedFileError", "HarmfulFileError", "check_records", "list_records", "scan_pickles"]

_MAX_READ = 2**26
"""Largest part of a file that is read at once: the index of an archive, or a pickle. One with 100,000 tensors is a
quarter of it."""
_MAX_RECORDS = 500_000
_MAX_COST = 2**28
"""Bytes that the values of all pickles in a file may take, without the numbers of tensors, which are elsewhere. The
checkpoint of a training with 10,000 tensors has less than a tenth."""
_COST = 64
"""Of any step of a pickle, in bytes. It bounds the time as well."""
_CONTAINER_COST = 256
_MAX_DEPTH = 100
"""How many tuples may be in each other: hashing one recurses without a limit until the process crashes."""
_MAX_VIEW = 2**28
"""Elements of a tensor that repeats the values of a smaller storage."""
_NUM_LEGACY_PICKLES = 5
"""Before zip archives: a number, a version, the system, the value, and the names of its storages, in a row."""
_ITEM_SIZES = {
    **{f"{kind}Storage": 1 for kind in ("Untyped", "Bool", "Byte", "Char", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")},
    **{f"{kind}Storage": 2 for kind in ("Short", "Half", "BFloat16")},
    **{f"{kind}Storage": 4 for kind in ("Int", "Float", "QInt32")},
    **{f"{kind}Storage": 8 for kind in ("Long", "Double", "ComplexFloat")},
    "ComplexDoubleStorage": 16,
}
"""Bytes of an element, by the class of its storage. Not every torch compares a storage with its record."""
_CONSTRUCTOR = re.compile(r"torch\.(?:\w+\.)*(?:\w*Tensor|\w*Storage)")
_UNREADABLE = {"torch._utils._rebuild_nested_tensor", "torch._utils._rebuild_wrapper_subclass"}
"""Of tensors that are no weights, and whose sizes torch does not compare with their storage."""


class DamagedFileError(Exception):
    """It is cut off or damaged; the message says how."""


class HarmfulFileError(Exception):
    """It is not what `torch.save` writes, and would take the memory or crash; the message goes after "it "."""


def list_records(file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The records of a zip archive by their names.

    Raises:
        DamagedFileError: it is cut off or damaged.
        HarmfulFileError: there are more than in any checkpoint, or two have the same name.
    """
    with _archive(file) as archive:
        records = archive.infolist()
    if len(records) > _MAX_RECORDS:
        raise HarmfulFileError(f"has {len(records)} records")
    if len({each.filename.lower() for each in records}) < len(records):  # torch ignores case
        raise HarmfulFileError("has two records of the same name, as torch.save never writes")
    return {each.filename: each for each in records}


def check_records(file: BinaryIO, records: Mapping[str, zipfile.ZipInfo]) -> None:
    """Check the records of an archive of `torch.save`, and their checksums, which torch ignores.

    Raises:
        DamagedFileError: one is cut off or damaged.
        HarmfulFileError: they are compressed or overlap, and so unpack to more than the file has.
    """
    if any(each.compress_type != zipfile.ZIP_STORED for each in records.values()):
        raise HarmfulFileError("is a compressed archive, which torch.save never writes")
    starts_late = min((each.header_offset for each in records.values()), default=0) > 0  # torch finds other records
    overlaps = sum(each.file_size for each in records.values()) > file.seek(0, 2)
    if starts_late or overlaps or any(each.file_size != each.compress_size for each in records.values()):
        raise HarmfulFileError("has records in the same place, as torch.save never writes")
    with _archive(file) as archive:
        corrupt = archive.testzip()
    if corrupt is not None:
        raise DamagedFileError(f"the checksum of {corrupt} does not match")


@contextmanager
def _archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as exc:
        raise DamagedFileError(str(exc)) from exc


def scan_pickles(file: BinaryIO, records: Mapping[str, zipfile.ZipInfo] | None) -> list[str]:
    """The names of all functions and classes in the file's pickles, by those of Python 3. Nothing is loaded.

    Args:
        file: the file.
        records: of `list_records`; None for the format before archives.

    Raises:
        DamagedFileError: a pickle is damaged.
        HarmfulFileError: its values would take much more memory than the file, or crash the process.
    """
    names: dict[str, None] = {}
    budget = _Budget()
    for stream, sizes in _pickles(file, records):
        try:
            scan = _Scan(stream, budget, sizes)
            names |= dict.fromkeys(scan.names())
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as exc:
            raise DamagedFileError(f"{type(exc).__name__}: {exc}".partition("\n")[0]) from exc
        if not scan.is_supported:
            break
    return [*names]


def _pickles(
    file: BinaryIO, records: Mapping[str, zipfile.ZipInfo] | None
) -> Iterator[tuple[IO[bytes], dict[str, int] | None]]:
    """Every pickle, and the sizes of the storages that it may name."""
    file.seek(0)
    if records is None:
        bounded = _Bounded(file)
        for _ in range(_NUM_LEGACY_PICKLES):
            if not bounded.read(1):
                return
            bounded.seek(-1, 1)
            yield bounded, None  # type: ignore[misc]
        return
    with _archive(file) as archive:
        for name in records:
            if name.lower().endswith("data.pkl"):
                folder = f"{name[: -len('data.pkl')]}data/"
                sizes = {
                    key.removeprefix(folder): each.file_size for key, each in records.items() if key.startswith(folder)
                }
                if records[name].file_size > _MAX_READ:
                    raise HarmfulFileError(_too_large(records[name].file_size))
                yield io.BytesIO(archive.read(name)), sizes


class _Bounded:
    """A file that reads no large part at once, so that a number in it cannot take the memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_READ:
            raise HarmfulFileError(_too_large(size))
        return self._file.read(_MAX_READ if size < 0 else size)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_READ)

    def close(self) -> None:
        """Leave the file open."""


def _too_large(size: int) -> str:
    return f"has {size} bytes in one piece beside the tensors, and at most {_MAX_READ} are read"


class _Budget:
    def __init__(self) -> None:
        self._left = _MAX_COST

    def spend(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise HarmfulFileError(f"has more than {_MAX_COST >> 20} MiB of values beside the tensors")


class _Name(str):
    """Of a function or class."""


class _Storage(NamedTuple):
    numel: int


class _Value:
    """What is known of a value in a pickle."""

    __slots__ = ("content", "depth", "size")

    def __init__(self, content: Any = None, *, size: int = 1, depth: int = 0) -> None:
        self.content = content
        """A number, text, name or storage, and of a tuple its values; None for others."""
        self.size = size
        """How many values are visited to hash it, or to go through it."""
        self.depth = depth
        """How many tuples are in each other."""


class _Scan:
    """Goes through a pickle as torch's reader would, with stand-ins for the values."""

    def __init__(self, stream: IO[bytes], budget: _Budget, sizes: Mapping[str, int] | None) -> None:
        self._stream = stream
        self._budget = budget
        self._sizes = sizes
        self._stack: list[_Value] = []
        self._below: list[list[_Value]] = []
        """The stacks below each mark."""
        self._memo: dict[int, _Value] = {}
        self.is_supported = True
        """Whether torch's reader would read all of it; False after an opcode that it refuses."""

    def names(self) -> Iterator[str]:
        """Go through the pickle, and return the names in it."""
        for opcode, argument, _ in pickletools.genops(self._stream):
            self._budget.spend(_COST)
            if opcode.name == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                # The protocol of torch.save uses the names of Python 2.
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                self._stack.append(_Value(_Name(f"{module}.{name}")))
                yield f"{module}.{name}"
            elif step := _STEPS.get(opcode.name):
                step(self, argument)
            elif opcode.name not in ("PROTO", "STOP"):
                self.is_supported = False  # torch stops here
                return

    def _push(self, argument: Any) -> None:
        self._budget.spend(len(argument) if isinstance(argument, str | bytes) else 0)
        self._stack.append(_Value(argument, size=len(argument) if isinstance(argument, str | bytes) else 1))

    def _push_container(self, _argument: Any) -> None:
        self._budget.spend(_CONTAINER_COST)
        self._stack.append(_Value(size=0))

    def _mark(self, _argument: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[_Value]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop(self, number: int) -> list[_Value]:
        if len(self._stack) < number:
            raise IndexError("its values end early")
        items = self._stack[-number:]
        del self._stack[-number:]
        return items

    def _make_tuple(self, items: Sequence[_Value]) -> None:
        self._budget.spend(_COST + 8 * len(items))
        depth = 1 + max((item.depth for item in items), default=0)
        if depth > _MAX_DEPTH:
            raise HarmfulFileError(f"has more than {_MAX_DEPTH} tuples in each other")
        size = min(1 + sum(item.size for item in items), _MAX_COST)
        self._stack.append(_Value(tuple(items), size=size, depth=depth))

    def _append(self, items: Sequence[_Value]) -> None:
        self._budget.spend(16 * len(items))
        self._stack[-1].size += sum(item.size for item in items)

    def _set_items(self, items: Sequence[_Value]) -> None:
        for key in items[::2]:
            self._budget.spend(_CONTAINER_COST // 2 + key.size)  # the key is hashed
        self._stack[-1].size += len(items)

    def _call(self, _argument: Any) -> None:
        function, arguments = self._pop(2)
        self._budget.spend(_CONTAINER_COST + arguments.size)
        _check_call(function.content, arguments.content)
        self._stack.append(_Value(b"" if function.content == "_codecs.encode" else None, size=arguments.size))

    def _build(self, _argument: Any) -> None:
        (state,) = self._pop(1)
        self._budget.spend(state.size)

    def _open_storage(self, _argument: Any) -> None:
        (identity,) = self._pop(1)
        parts = [item.content for item in identity.content] if isinstance(identity.content, tuple) else []
        numel = parts[4] if len(parts) >= 5 and isinstance(parts[4], int) else 0
        if self._sizes is not None and len(parts) >= 5:
            _, kind, key, _, _ = parts[:5]
            item_size = _ITEM_SIZES.get(str(kind).rpartition(".")[2])
            found, wanted = self._sizes.get(str(key)), numel * (item_size or 0)
            if item_size is not None and found != wanted:
                raise DamagedFileError(f"storage {key!s:.20} should have {wanted} bytes, and has {found}")
        self._stack.append(_Value(_Storage(numel)))


_STEPS: Mapping[str, Callable[[_Scan, Any], None]] = {
    **dict.fromkeys(("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"), _Scan._push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _Scan._push),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _Scan._push_container),
    "MARK": _Scan._mark,
    "EMPTY_TUPLE": lambda scan, _: scan._make_tuple([]),
    "TUPLE1": lambda scan, _: scan._make_tuple(scan._pop(1)),
    "TUPLE2": lambda scan, _: scan._make_tuple(scan._pop(2)),
    "TUPLE3": lambda scan, _: scan._make_tuple(scan._pop(3)),
    "TUPLE": lambda scan, _: scan._make_tuple(scan._pop_to_mark()),
    "APPEND": lambda scan, _: scan._append(scan._pop(1)),
    "APPENDS": lambda scan, _: scan._append(scan._pop_to_mark()),
    "SETITEM": lambda scan, _: scan._set_items(scan._pop(2)),
    "SETITEMS": lambda scan, _: scan._set_items(scan._pop_to_mark()),
    "REDUCE": _Scan._call,
    "NEWOBJ": _Scan._call,
    "BUILD": _Scan._build,
    "BINPERSID": _Scan._open_storage,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda scan, key: scan._memo.__setitem__(key, scan._stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda scan, key: scan._stack.append(scan._memo[key])),
}
"""What each opcode does that torch's reader knows."""


def _check_call(function: Any, arguments: Any) -> None:
    """Refuse calls that take memory by a number, and tensors of more numbers than the file has."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        return  # torch calls no others
    name, values = str(function), [argument.content for argument in arguments]
    is_text = len(values) >= 2 and type(values[0]) is str and values[1] in ("latin1", "latin-1")
    match name:
        case "builtins.bytearray":
            is_harmful = bool(values) and not (is_text or isinstance(values[0], bytes))
        case "_codecs.encode":
            is_harmful = not is_text
        case "torch._tensor._rebuild_from_type_v2":
            inner = values[0] if values else None
            is_harmful = not (isinstance(inner, _Name) and inner.startswith("torch._utils._rebuild_"))
            if not is_harmful and len(values) > 2:
                _check_call(inner, values[2])
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3":
            is_harmful = _is_large_view(values)
        case _:
            is_harmful = name in _UNREADABLE or (bool(values) and _CONSTRUCTOR.fullmatch(name) is not None)
    if is_harmful:
        raise HarmfulFileError(f"calls {name} in a way that torch.save never does")


def _is_large_view(values: Sequence[Any]) -> bool:
    """Whether a tensor is large only because it repeats the values of its storage."""
    if len(values) < 3 or not isinstance(values[0], _Storage) or not isinstance(values[2], tuple):
        return False
    sizes = [size.content for size in values[2]]
    numel = math.prod(sizes) if all(isinstance(size, int) for size in sizes) and len(sizes) < 64 else math.inf
    return numel > max(values[0].numel, _MAX_VIEW)
