"""Read a file of weights, of whichever trainer, without running anything that it names."""

import os
import re
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kd_pipeline._core.files import NotAFileError, open_regular
from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import first_few
from kd_pipeline._core.text import printable
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.torch_files import DamagedFileError, HarmfulFileError, check_records, list_records, scan_pickles

__all__ = ["keeps_order", "open_weights", "read_checkpoint"]

_SAVE = 'torch.save(model.state_dict(), "weights.pt")'
_AGAIN = "copy or download it again"

_MAPPINGS = frozenset({
    "collections.defaultdict", "addict.addict.Dict", "easydict.EasyDict", "munch.Munch", "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode", "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict", "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
})  # fmt: skip
"""Kinds of dicts in the files of well-known trainers, which are read as plain ones."""
_VALUES = frozenset({
    "argparse.Namespace", "types.SimpleNamespace", "collections.deque", "builtins.bool", "builtins.int",
    "builtins.float", "builtins.str", "builtins.bytes", "builtins.list", "builtins.tuple", "builtins.dict",
    "builtins.frozenset", "builtins.range", "builtins.slice", "builtins.object", "builtins.getattr",
    "copyreg._reconstructor", "datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone",
    "decimal.Decimal", "fractions.Fraction", "uuid.UUID", "functools.partial", "_operator.getitem",
})  # fmt: skip
_VALUE_MODULES = frozenset({
    "numpy", "numpy.dtypes", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric",
    "numpy._core.numeric", "numpy.random._pickle", "numpy.random.bit_generator", "numpy.random._mt19937",
    "numpy.random._pcg64", "numpy.random._philox", "numpy.random._sfc64", "numpy.random.mtrand", "pathlib",
    "pathlib._local", "typing", "torch.optim.lr_scheduler", "torchvision.transforms.functional",
    "mmengine.logging.history_buffer", "omegaconf", "omegaconf.base", "omegaconf.dictconfig", "omegaconf.listconfig",
    "omegaconf.nodes", "ml_collections.config_dict.config_dict",
})  # fmt: skip
"""What trainers save beside the weights: options, configs, metrics and random states. None of it is needed here."""
_MAX_HEADER = 2**24
"""Bytes of the header of a safetensors file, which has about a hundred for each tensor."""
_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}


class _IgnoredValue(list[Any]):
    """Stands for every value of a listed kind: takes whatever it gets, and does nothing with it."""

    def __new__(cls, *_arguments: Any) -> "_IgnoredValue":
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, _state: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _PlainMapping:
    """Stands for every kind of dict."""

    def __new__(cls, *_arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_checkpoint(path: Path) -> Any:
    """The contents of a file of `torch.save` or safetensors; what it is, is decided by content and not by name.

    Tensors and plain values come as they are. Other objects may only be of the kinds that well-known trainers save,
    such as `argparse.Namespace` and NumPy scalars; they are replaced by inert ones. Nothing that the file names is
    imported or called.

    Raises:
        ConfigError: there is no such file, it is cut off or damaged, something else than weights, or holds an object
            of another kind.
        MissingPackageError: it needs safetensors, which is not installed.
    """
    if path.is_dir():
        raise _folder(path)
    try:
        file = open_weights(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; correct checkpoint") from None
    except OSError as exc:
        advice = "set checkpoint to a file of weights" if isinstance(exc, NotAFileError) else "correct its permissions"
        raise _refused(path, f"it cannot be read: {exc.strerror}", advice) from exc
    with file:
        head = file.read(1024)
        _check_kind(path, file, head)
        if _is_safetensors(head):
            return _read_safetensors(path, file, head)
        return _read_pickle(path, file, is_zip=head.startswith(b"PK"))


def keeps_order(path: Path) -> bool:
    """Whether a file that `read_checkpoint` reads has its tensors in the order of the network.

    Raises:
        OSError: it cannot be opened.
    """
    with open_weights(path) as file:
        return not _is_safetensors(file.read(1024))


def open_weights(path: Path) -> BufferedReader:
    """Open a file of weights, which has to fit into the memory of this machine.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger than the memory.
    """
    return open_regular(path, max_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _refused(path: Path, reason: str, advice: str) -> ConfigError:
    return ConfigError(f"{path} is not loaded: {reason}; {advice}")


def _folder(path: Path) -> ConfigError:
    names = ("exported/model.safetensors", "model.safetensors", "pytorch_model.bin", "checkpoints/best_student.pt")
    found = [path / name for name in names if (path / name).is_file()]
    found = found or sorted(each for each in path.iterdir() if each.suffix in (".pt", ".pth", ".ckpt", ".bin"))
    if (path / ".metadata").is_file():
        advice = f"where the model is whole, {_SAVE} writes one file"
        return _refused(path, "it is a folder of torch.distributed.checkpoint, in parts", advice)
    advice = f"set checkpoint to a file, such as {found[0]}" if found else "set checkpoint to a file of weights"
    return _refused(path, "it is a folder", advice)


def _check_kind(path: Path, file: BinaryIO, head: bytes) -> None:
    """Refuse by name what is often found in the place of weights."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise _refused(path, "it is empty", _AGAIN)
    if head.startswith(b"version https://git-lfs"):
        advice = f"run `git lfs pull` in {path.absolute().parent} to get them"
        raise _refused(path, "it is a git-lfs pointer, a few lines of text in the place of the weights", advice)
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        advice = "download the file itself, after signing in if its site asks for that"
        raise _refused(path, "it is a web page, which a failed download leaves", advice)
    for start, name in _ARCHIVES.items():
        if head.startswith(start):
            raise _refused(path, f"it is a {name} archive", "unpack it, and set checkpoint to the file in it")
    if head.startswith(b"\x89HDF"):
        raise _refused(path, "it is an HDF5 file, as Keras writes", "give weights of PyTorch")
    if head.startswith(b"\x93NUMPY"):
        raise _refused(path, "it is a NumPy array", f"give a state dict: {_SAVE}")
    if _is_onnx(path, head):
        advice = "a teacher in this format is set as teacher.onnx, in place of teacher.model"
        raise _refused(path, "it is an ONNX model, which has its network in it", advice)
    if not head.startswith((b"PK", b"\x80")) and not _is_safetensors(head):
        if names := list(_names_in_tar(file)):
            raise _tar(path, names)
        kind = "it is a text file" if _is_text(head) else "it is not a file of torch.save or safetensors, or damaged"
        raise _refused(path, kind, f"{_AGAIN}, or write one with {_SAVE}")


def _names_in_tar(file: BinaryIO) -> Iterator[str]:
    """The first names in a tar archive, without unpacking anything; none if it is no such archive."""
    position = 0
    for _ in range(8):
        file.seek(position)
        try:
            member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return
        yield member.name
        position += tarfile.BLOCKSIZE * (1 + -(-max(member.size, 0) // tarfile.BLOCKSIZE))


def _tar(path: Path, names: Collection[str]) -> ConfigError:
    if {"storages", "tensors", "pickle"} <= {*names}:
        advice = f"load it where it was made, and save it again with {_SAVE}"
        return _refused(path, "it is in the tar format of PyTorch before 0.2, which cannot be read safely", advice)
    return _refused(path, "it is a tar archive", "unpack it, and set checkpoint to the file in it")


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in head[: len(head) - 3].decode()  # a character may be cut off
    except UnicodeDecodeError:
        return False


def _is_onnx(path: Path, head: bytes) -> bool:
    """By its first field, the version of the format, and the next, a text."""
    return path.suffix == ".onnx" or (len(head) > 3 and head[0] == 8 and head[1] < 32 and head[2] in (0x12, 0x3A, 0x42))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _read_safetensors(path: Path, file: BinaryIO, head: bytes) -> dict[str, Any]:
    safetensors = require("safetensors.torch", extra="timm")
    size = int.from_bytes(head[:8], "little")
    if size > _MAX_HEADER:
        raise _refused(path, f"it is a safetensors file with a header of {size} bytes", _AGAIN)
    try:
        # The open file, whatever is at its path by now.
        loaded: dict[str, Any] = safetensors.load_file(f"/proc/self/fd/{file.fileno()}")
    except Exception as exc:  # a class of its own, which says where the file ends
        line = printable(f"{exc!s:.200}")
        raise _refused(path, f"it is a safetensors file that is cut off or damaged ({line})", _AGAIN) from exc
    return loaded


def _read_pickle(path: Path, file: BinaryIO, *, is_zip: bool) -> Any:
    try:
        records = list_records(file) if is_zip else None
        if records is not None:
            _check_names_of_records(path, [*records])
            check_records(file, records)
        names = sorted(name for name in scan_pickles(file, records) if not _is_known_to_torch(name))
    except DamagedFileError as exc:
        raise _refused(path, f"it is cut off or damaged ({printable(f'{exc!s:.200}')})", _AGAIN) from exc
    except HarmfulFileError as exc:
        raise _refused(path, f"it {exc}", f"{_AGAIN}, or write one with {_SAVE}") from exc
    _check_names(path, names)
    ignored: list[Any] = [(_PlainMapping if name in _MAPPINGS else _IgnoredValue, name) for name in names]
    file.seek(0)
    try:
        with torch.serialization.safe_globals(ignored), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the error
            return torch.load(file, "cpu", weights_only=True)
    except Exception as exc:  # damaged bytes can make torch raise anything
        if unlisted := re.search(r"GLOBAL (\S+)", str(exc)):
            _check_names(path, [unlisted[1]])
        if "WeightsUnpickler" in str(exc):
            # The rest of torch's message advises running the code in the file.
            line = printable(str(exc).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0])
            advice = f"save the weights alone, in the program that made the file: {_SAVE}"
            raise _refused(path, f"it holds more than tensors and plain values ({line:.200})", advice) from exc
        line = printable(f"{type(exc).__name__}: {exc}".partition("\n")[0])
        reason = f"it is cut off, damaged or not a file of torch.save ({line:.200})"
        raise _refused(path, reason, f"{_AGAIN}, or write one with {_SAVE}") from exc


def _check_names_of_records(path: Path, names: Sequence[str]) -> None:
    """Refuse a zip archive that `torch.save` did not write."""
    if any(name.endswith("/constants.pkl") for name in names) or any("/code/__torch__" in name for name in names):
        advice = f"save the weights where the network was made: {_SAVE}"
        raise _refused(path, "it is a TorchScript archive, a program with weights", advice)
    if not any(name.endswith("data.pkl") for name in names):
        if names and all(name.endswith(".npy") for name in names):
            raise _refused(path, "it is an archive of NumPy arrays", f"give a state dict: {_SAVE}")
        advice = f"set checkpoint to a file of weights: {_SAVE}"
        raise _refused(path, f"it is a zip archive of {first_few(names)}", advice)


def _is_known_to_torch(name: str) -> bool:
    if name.startswith("torch.") and not name.startswith(
        ("torch.nn.modules.", "torch.fx.", "torch.optim.lr_scheduler.")
    ):
        return True  # or torch refuses it
    return name in ("collections.OrderedDict", "collections.Counter", "_codecs.encode") or (
        name in ("builtins.set", "builtins.bytearray", "builtins.complex")
    )


def _check_names(path: Path, names: Collection[str]) -> None:
    """Refuse objects of kinds that are not listed."""
    unlisted = [
        name for name in names if name not in _MAPPINGS | _VALUES and name.rpartition(".")[0] not in _VALUE_MODULES
    ]
    if not unlisted:
        return
    if whole := [name for name in unlisted if _is_network(name)]:
        reason = f"it holds a whole pickled network ({first_few(whole)}), and loading one runs code"
    else:
        reason = f"it holds the Python object {first_few(unlisted)}, and loading objects can run code"
    raise _refused(path, reason, f"save the weights alone, in the program that made the file: {_SAVE}")


def _is_network(name: str) -> bool:
    return name.startswith(
        ("torch.nn.modules.", "torch.fx.", "torchvision.models.", "timm.models.", "transformers.models.")
    )
