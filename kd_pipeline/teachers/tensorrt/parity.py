"""The file with the reference of an engine: the images it is compared on, and the outputs of float32 for them."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_pipeline._core.files import open_trusted
from kd_pipeline._core.text import printable
from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.parity import ParityReference
from kd_pipeline.teachers.tensorrt.manifest import Parity, read_if_digest, why_unreadable

__all__ = ["load_reference", "parity_path"]

_MAX_BYTES = 4 << 30


def parity_path(engine: Path) -> Path:
    """The file with the reference of an engine: `<engine>.parity.npz`."""
    return engine.with_name(f"{engine.name}.parity.npz")


def load_reference(engine: Path, parity: Parity) -> ParityReference:
    """Read the reference beside `engine`.

    Raises:
        EngineError: it cannot be read, somebody else could have written it, its digest is not the one in `parity`, or
            it holds no reference.
    """
    path, advice = parity_path(engine), "; delete it, and build the engine again"
    try:
        with open_trusted(path, max_bytes=_MAX_BYTES) as file:
            found, content = read_if_digest(file, [parity.tensors_sha256])
    except OSError as exc:
        raise EngineError(why_unreadable(path, exc, advice)) from None
    if content is None:
        raise EngineError(
            printable(f"{path} has the sha256 {found}, wanted {parity.tensors_sha256}; build the engine again")
        )
    try:
        tensors = _read_tensors(content, parity.num_images)
    except Exception as exc:  # zipfile and NumPy raise of many kinds
        raise EngineError(printable(f"{path} holds no images and outputs: {exc!r}{advice}")) from None
    images = tensors.pop("images")
    return ParityReference(images, tensors, printable(parity.images))


def _read_tensors(content: bytes, num_images: int) -> dict[str, Tensor]:
    """The float32 tensors of an `.npz` file that `ParityReference.to_bytes` made; raises whatever is wrong with it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
    if num_bytes > len(content):  # it would be compressed, and nothing is
        raise ValueError(f"it would unpack to {num_bytes} bytes")
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    tensors = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
    if not {"images", "logits"} <= tensors.keys() or {len(tensor) for tensor in tensors.values()} != {num_images}:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"found {found}, wanted images and logits, {num_images} of each")
    return tensors
