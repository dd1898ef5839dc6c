"""Files of real trainers, files in their place, and files that want to run code."""

import argparse
import builtins
import collections
import datetime
import gzip
import importlib
import io
import os
import pathlib
import pickle
import shutil
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kd_pipeline.errors import ConfigError
from kd_pipeline.models.checkpoints import read_checkpoint

STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2)}


def is_state(found: Any) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


def extras() -> dict[str, Any]:
    """What trainers save beside the weights."""
    return {
        "args": argparse.Namespace(
            lr=np.float32(0.1), out=pathlib.PurePosixPath("a"), when=datetime.timedelta(1), dtype=np.dtype("int8")
        ),
        "namespace": types.SimpleNamespace(model="resnet18"),
        "metric": np.float64(71.5),
        "history": np.arange(3),
        "by_class": collections.defaultdict(list, {"cat": [1]}),
        "last": collections.deque([1, 2], maxlen=3),
        "counts": collections.Counter("aab"),
        "keys": {np.int64(3)},
        "random": (np.random.RandomState(0), np.random.default_rng(0), torch.get_rng_state()),
        "shape": torch.Size([3]),
        "bytes": b"abc",
        "nothing": None,
    }


@pytest.mark.parametrize("is_zip", [True, False])
def test_objects_beside_the_weights(tmp_path: Path, is_zip: bool) -> None:
    content = {"state_dict": STATE, **extras()}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(tmp_path / "a.pth.tar")
    assert is_state(found["state_dict"])
    assert found.keys() == content.keys()
    assert found["by_class"] == {"cat": [1]}
    assert not isinstance(found["args"], argparse.Namespace)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
def test_content_decides(tmp_path: Path, suffix: str) -> None:
    save_file(STATE, tmp_path / f"a{suffix}")
    assert is_state(read_checkpoint(tmp_path / f"a{suffix}"))
    torch.save(STATE, tmp_path / f"b{suffix}")
    assert is_state(read_checkpoint(tmp_path / f"b{suffix}"))


def foreign(*names: str) -> None:
    """Make classes that exist where the file is written, and not where it is read."""
    for name in names:
        module, _, kind = name.rpartition(".")
        base = dict if kind in ("CfgNode", "ConfigDict", "AttributeDict") else object
        made = type(kind, (base,), {"__module__": module, "__qualname__": kind})
        for end in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:end])
            if part not in importlib.sys.modules:  # type: ignore[attr-defined]
                importlib.sys.modules[part] = types.ModuleType(part)  # type: ignore[attr-defined]
        setattr(importlib.sys.modules[module], kind, made)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    [
        "yacs.config.CfgNode",
        "omegaconf.dictconfig.DictConfig",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "mmengine.config.config.ConfigDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ],
)
def test_configs_of_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    modules = importlib.sys.modules  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.sys, "modules", modules)  # type: ignore[attr-defined]
    before = set(modules)
    try:
        foreign(name)
        module, _, kind = name.rpartition(".")
        config = getattr(modules[module], kind)()
        if isinstance(config, dict):
            config["lr"] = 0.1
        config.frozen = True
        torch.save({"model": STATE, "config": config}, tmp_path / "a.pth")
    finally:
        for added in set(modules) - before:
            del modules[added]
    assert is_state(read_checkpoint(tmp_path / "a.pth")["model"])


class Malicious:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: str) -> dict[str, Malicious]:
    code = f"import os; os.mkdir({marker!r})"
    return {
        "posix.mkdir": Malicious(os.mkdir, marker),
        "posix.system": Malicious(os.system, f"mkdir {marker}"),
        "exec": Malicious(builtins.exec, code),
        "eval": Malicious(builtins.eval, f"__import__('os').mkdir({marker!r})"),
        "importlib.import_module": Malicious(importlib.import_module, "this"),
        "numpy.load": Malicious(np.load, marker),
        "builtins.getattr": Malicious(getattr, Malicious(importlib.import_module, "os"), "mkdir"),
        "functools.partial": Malicious(__import__("functools").partial, os.mkdir, marker),
        "argparse.Namespace": Malicious(argparse.Namespace, Malicious(os.mkdir, marker)),
        "pathlib.PosixPath.mkdir": Malicious(pathlib.Path.mkdir, pathlib.Path(marker)),
    }


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("attack", attacks("").keys())
def test_no_code_runs(tmp_path: Path, attack: str, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    content = {"state_dict": STATE, "args": argparse.Namespace(x=attacks(str(marker))[attack])}
    if kind == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    try:
        found = read_checkpoint(path)
    except ConfigError as error:
        assert "is not loaded" in str(error)
        assert "weights_only" not in str(error) and "add_safe_globals" not in str(error)
    else:
        assert is_state(found["state_dict"])  # a listed kind, which does nothing
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for attack in ("posix.mkdir", "posix.system", "exec", "eval"):
        pickle.loads(pickle.dumps(attacks(str(marker))[attack]))
        marker.rmdir()


@pytest.mark.parametrize("is_zip", [True, False])
def test_unlisted_object_is_named(tmp_path: Path, is_zip: bool) -> None:
    content = {"state_dict": STATE, "sampler": torch.utils.data.SequentialSampler([1]), "x": Malicious(os.mkdir, "y")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConfigError, match=r"holds the Python object posix\.mkdir") as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert (
        'save the weights alone, in the program that made the file: torch.save(model.state_dict(), "weights.pt")'
        in str(caught.value)
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"epoch": 3, "model": net}])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("make", [Net, lambda: nn.Linear(3, 2)])
def test_whole_network(
    tmp_path: Path, wrap: Callable[[nn.Module], object], is_zip: bool, make: Callable[[], nn.Module]
) -> None:
    torch.save(wrap(make()), tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConfigError, match=r"holds a whole pickled network \(.*torch\.nn.*\.state_dict\(\)"):
        read_checkpoint(tmp_path / "a.pt")


def write_tar(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def write_zip(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"1")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 102530333\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"is a git-lfs pointer, .*; run `git lfs pull` in /.* to get them"),
        (b"", "it is empty; copy or download it again"),
        (b"<!DOCTYPE html>\n<html>", "is a web page, which a failed download leaves; download the file itself"),
        (b"\n <html lang='en'>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page"),
        (b'{"error": "not found"}', "is a text file; copy or download it again"),
        (b"not weights\n", "is a text file"),
        (gzip.compress(b"abc", mtime=0), "is a gzip archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, as Keras writes"),
        (b"\x93NUMPY" + bytes(99), "is a NumPy array"),
        (bytes(100), "is not a file of torch.save or safetensors, or damaged"),
        (b"PK\x03\x04" + bytes(100), "it is cut off or damaged"),
        (pickle.dumps({"a": 1}), r"it holds more than tensors and plain values \(Unsupported operand 149\)"),
        (pickle.dumps({"a": 1}, protocol=2), "it is cut off, damaged or not a file of torch.save"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_something_else(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} is not loaded: .*{message}"):
        read_checkpoint(tmp_path / name)


def test_other_archives(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", "model.pth")
    write_tar(tmp_path / "b.tar", "storages", "tensors", "pickle")
    write_zip(tmp_path / "c.zip", "readme.txt", "model.pth")
    np.savez(tmp_path / "d.npz", a=np.ones(3))
    for name, message in {
        "a.tar": "it is a tar archive; unpack it",
        "b.tar": "in the tar format of PyTorch before 0.2",
        "c.zip": "it is a zip archive of readme.txt, model.pth",
        "d.npz": "it is an archive of NumPy arrays",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_checkpoint(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3)), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=r"is a TorchScript archive, .*; save the weights where the network was made"):
        read_checkpoint(tmp_path / "a.pt")


def test_onnx(tmp_path: Path, exported: Callable[[int], Path]) -> None:
    shutil.copy(exported(0), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"is an ONNX model, .* is set as teacher\.onnx, in place of teacher\.model"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "a.pt"
    state = {"fc.weight": torch.ones(100, 100)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"a\.pt is not loaded: .*(cut off|damaged).* copy or download it again"):
        read_checkpoint(path)


def test_a_changed_byte(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(100, 100)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"it is cut off or damaged \(the checksum of a/data/0 does not match\)"):
        read_checkpoint(tmp_path / "a.pt")


def test_folders_and_pipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder; set checkpoint to a file of weights"):
        read_checkpoint(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"it is a folder; set checkpoint to a file, such as {tmp_path}/model\.saf"):
        read_checkpoint(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(ConfigError, match=r"it is a folder of torch\.distributed\.checkpoint"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="it cannot be read: this is a pipe and no file; set checkpoint to a file"):
        read_checkpoint(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"none\.pt: there is no such file; correct checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
