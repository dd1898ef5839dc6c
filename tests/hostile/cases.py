"""What a hostile file is in these tests: how it is made, what opens it, and how that has to end."""

import io
import json
import os
import pickle
import shutil
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_pipeline.cli import main
from kd_pipeline.errors import KDPipelineError

MARKER = "MARKER"
"""Name of what the code in a hostile file would make in the case's folder."""
HUGE = 2**36
"""Bytes of a sparse file; more than the machine has memory."""
DEEP = 100_000
"""Levels of a nested text."""


class CommandError(KDPipelineError):
    """A command has ended with status 1, after one message on stderr."""


@dataclass(frozen=True)
class Case:
    """A hostile file."""

    name: str
    build: Callable[[Path], Path]
    """Writes it into the folder, and returns the path to open."""
    open: Callable[[Path], object]
    """Opens it as users do."""
    error: type[KDPipelineError] | None
    """What opening it raises; None where the file is ignored, and `open` itself checks the result."""
    names: str | None = None
    """What the message names; defaults to the name of the file."""


class Kind:
    """Files that are opened in the same way."""

    def __init__(
        self,
        name: str,
        open: Callable[[Path], object],
        error: type[KDPipelineError] | None,
        *,
        file: str,
        around: Callable[[Path], None] = lambda folder: None,
        target: str | None = None,
    ) -> None:
        """Describe the kind.

        Args:
            name: for the names of the cases.
            open: opens the target.
            error: what it raises.
            file: name of the hostile file in the folder.
            around: writes the other files that belong to it.
            target: what is opened; defaults to the file.
        """
        self.name, self.open, self.error, self.file, self.around = name, open, error, file, around
        self.target = file if target is None else target
        self.cases: list[Case] = []

    def add(self, name: str, write: Callable[[Path], object], **changes: Any) -> None:
        """Add a case whose file `write` makes, at the path that it gets."""

        def build(folder: Path) -> Path:
            self.around(folder)
            path = folder / self.file
            remove(path)
            write(path)
            return folder / self.target

        about = {"open": self.open, "error": self.error, **changes}
        self.cases.append(Case(f"{self.name}: {name}", build, **about))

    def add_bytes(self, name: str, content: bytes, **changes: Any) -> None:
        """Add a case with this content."""
        self.add(name, lambda path: path.write_bytes(content), **changes)

    def add_special(self, *leave_out: str, **changes: Any) -> None:
        """Add what is no regular file, or a file that is too large, in the place of this kind."""
        for name, make in SPECIAL.items():
            if name not in leave_out:
                self.add(name, make, **changes)

    def add_nested_json(self, *keys: str) -> None:
        """Add JSON that is nested deeply, alone and in an object under a key."""
        self.add_bytes("nested", b"[" * DEEP)
        self.add_bytes("nested objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP)
        for key in keys:
            self.add_bytes(f"nested {key}", json.dumps({key: 0}).encode().replace(b"0", b"[" * DEEP + b"]" * DEEP))


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_socket(path: Path) -> None:
    """A socket; its own path is short, as those of sockets must be."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def make_sparse(path: Path) -> None:
    """A file of zeros that takes no space."""
    with path.open("wb") as file:
        file.truncate(HUGE)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "larger than memory": make_sparse,
}


class Code:
    """Pickled, it makes the marker when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.marker = str(folder / MARKER)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run(arguments: Sequence[str | Path]) -> str:
    """Run `kd-pipeline`; a status of 1 raises the message, and any other returns a text about it."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(each) for each in arguments])
        except SystemExit as exc:
            status = exc.code
    text = err.getvalue()
    if status != 1 or "Traceback" in text + out.getvalue():
        return f"status {status}: {text}{out.getvalue()}"
    messages = [line for line in text.splitlines() if line.startswith("kd-pipeline: ")]
    raise CommandError("\n".join(messages) if messages else f"no message, but: {text}{out.getvalue()}")


def write_zip(path: Path, members: Iterable[tuple[str, Iterable[bytes]]], *, compress: bool = True) -> None:
    """A ZIP archive, written piece by piece."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED, compresslevel=1) as file:
        for name, pieces in members:
            with file.open(name, "w", force_zip64=True) as member:
                for piece in pieces:
                    member.write(piece)


def zeros(num_bytes: int) -> Iterable[bytes]:
    """As many zeros, in pieces."""
    piece = bytes(2**22)
    for start in range(0, num_bytes, len(piece)):
        yield piece[: num_bytes - start]


class _Storage:
    """Stands for the numbers of a tensor in a pickle."""


class _Tensor:
    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.arguments = (_Storage(), offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def write_torch_archive(
    path: Path,
    numel: int,
    pieces: Iterable[bytes],
    *,
    size: tuple[int, ...] | None = None,
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    compress: bool = False,
) -> None:
    """What `torch.save({"state_dict": {"fc.weight": tensor}})` writes, with any claim about the tensor."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, _Storage) else None

    stream = io.BytesIO()
    tensor = _Tensor(size or (numel,), stride, offset)
    Pickler(stream, protocol=2).dump({"state_dict": {"fc.weight": tensor}})
    members = [("a/data.pkl", [stream.getvalue()]), ("a/byteorder", [b"little"]), ("a/data/0", pieces)]
    write_zip(path, [*members, ("a/version", [b"3\n"])], compress=compress)
