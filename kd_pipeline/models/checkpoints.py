"""Read a file of weights, of whichever trainer, without running anything that it names."""

import pickletools
import re
import stat
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from kd_pipeline._core.optional import require
from kd_pipeline._core.suggestions import first_few
from kd_pipeline.errors import ConfigError

__all__ = ["read_checkpoint"]

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
    _check_regular_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as exc:
        raise _refused(path, f"it cannot be read ({exc.strerror})", "correct its permissions") from exc
    _check_kind(path, head)
    if _is_safetensors(head):
        return _read_safetensors(path)
    return _read_pickle(path, is_zip=head.startswith(b"PK"))


def _refused(path: Path, reason: str, advice: str) -> ConfigError:
    return ConfigError(f"{path} is not loaded: {reason}; {advice}")


def _check_regular_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        reason = "there is no such file" if isinstance(exc, FileNotFoundError) else f"{exc.strerror}"
        raise ConfigError(f"{path}: {reason}; correct checkpoint") from None
    if stat.S_ISDIR(mode):
        names = ("exported/model.safetensors", "model.safetensors", "pytorch_model.bin", "checkpoints/best_student.pt")
        found = [path / name for name in names if (path / name).is_file()]
        found = found or sorted(each for each in path.iterdir() if each.suffix in (".pt", ".pth", ".ckpt", ".bin"))
        if (path / ".metadata").is_file():
            advice = f"where the model is whole, {_SAVE} writes one file"
            raise _refused(path, "it is a folder of torch.distributed.checkpoint, in parts", advice)
        advice = f"set checkpoint to a file, such as {found[0]}" if found else "set checkpoint to a file of weights"
        raise _refused(path, "it is a folder", advice)
    if not stat.S_ISREG(mode):
        raise _refused(path, "it is a pipe or a device", "set checkpoint to a file of weights")


def _check_kind(path: Path, head: bytes) -> None:
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
        if tarfile.is_tarfile(path):
            raise _tar(path)
        kind = "it is a text file" if _is_text(head) else "it is not a file of torch.save or safetensors, or damaged"
        raise _refused(path, kind, f"{_AGAIN}, or write one with {_SAVE}")


def _tar(path: Path) -> ConfigError:
    with tarfile.open(path) as archive:
        names = set(archive.getnames())
    if {"storages", "tensors", "pickle"} <= names:
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


def _read_safetensors(path: Path) -> dict[str, Any]:
    safetensors = require("safetensors.torch", extra="timm")
    try:
        loaded: dict[str, Any] = safetensors.load_file(path)
    except Exception as exc:  # a class of its own, which says where the file ends
        raise _refused(path, f"it is a safetensors file that is cut off or damaged ({exc})", _AGAIN) from exc
    return loaded


def _read_pickle(path: Path, *, is_zip: bool) -> Any:
    if is_zip:
        _check_archive(path)
    names = _names_in(path, is_zip=is_zip)
    _check_names(path, names)
    ignored: list[Any] = [(_PlainMapping if name in _MAPPINGS else _IgnoredValue, name) for name in names]
    try:
        # An open file, because torch decides by the name of others.
        with path.open("rb") as file, torch.serialization.safe_globals(ignored), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, before the error
            return torch.load(file, "cpu", weights_only=True)
    except Exception as exc:  # damaged bytes can make torch raise anything
        if unlisted := re.search(r"GLOBAL (\S+)", str(exc)):
            _check_names(path, [unlisted[1]])
        if "WeightsUnpickler" in str(exc):
            # The rest of torch's message advises running the code in the file.
            line = str(exc).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            advice = f"save the weights alone, in the program that made the file: {_SAVE}"
            raise _refused(path, f"it holds more than tensors and plain values ({line:.200})", advice) from exc
        line = f"{type(exc).__name__}: {exc}".partition("\n")[0]
        reason = f"it is cut off, damaged or not a file of torch.save ({line:.200})"
        raise _refused(path, reason, f"{_AGAIN}, or write one with {_SAVE}") from exc


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that is damaged, which torch does not check, or that `torch.save` did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            corrupt = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as exc:
        raise _refused(path, f"it is cut off or damaged ({exc})", _AGAIN) from exc
    if corrupt is not None:
        raise _refused(path, f"it is damaged (the checksum of {corrupt} does not match)", _AGAIN)
    if any(name.endswith("/constants.pkl") for name in names) or any("/code/__torch__" in name for name in names):
        advice = f"save the weights where the network was made: {_SAVE}"
        raise _refused(path, "it is a TorchScript archive, a program with weights", advice)
    if not any(name.endswith("data.pkl") for name in names):
        if names and all(name.endswith(".npy") for name in names):
            raise _refused(path, "it is an archive of NumPy arrays", f"give a state dict: {_SAVE}")
        advice = f"set checkpoint to a file of weights: {_SAVE}"
        raise _refused(path, f"it is a zip archive of {first_few(names)}", advice)


def _names_in(path: Path, *, is_zip: bool) -> list[str]:
    """The names in the file's pickles that torch does not know, without loading them."""
    names: set[str] = set()
    try:
        for stream in _pickles(path, is_zip=is_zip):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                    # The protocol of torch.save uses the names of Python 2.
                    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    names.add(f"{module}.{name}")
    except Exception:  # torch's own reader finds the damage again, and says what it is
        pass
    return sorted(name for name in names if not _is_known_to_torch(name))


def _pickles(path: Path, *, is_zip: bool) -> Iterator[IO[bytes]]:
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    with archive.open(name) as stream:
                        yield stream
        return
    with path.open("rb") as file:
        for _ in range(4):  # before zip archives: a number, a version, the system, and the value, in a row
            yield file


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
