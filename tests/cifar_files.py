"""CIFAR files in the authors' formats, with a few random images."""

import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_IMAGES = {"train": 50, "test": 10}
"""Replaces `kd_pipeline.data.sources.pixels.cifar._NUM_IMAGES`."""
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = [f"fine_{number}" for number in range(100)]
COARSE = [f"coarse_{number}" for number in range(20)]
FOLDERS = {
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "binary"): "cifar-100-binary",
    ("cifar100", "python"): "cifar-100-python",
}
ARCHIVES = {
    ("cifar10", "binary"): "cifar-10-binary.tar.gz",
    ("cifar10", "python"): "cifar-10-python.tar.gz",
    ("cifar100", "binary"): "cifar-100-binary.tar.gz",
    ("cifar100", "python"): "cifar-100-python.tar.gz",
}


class Content(NamedTuple):
    images: np.ndarray
    """`[N, 32, 32, 3]`."""
    labels: dict[str, np.ndarray]
    """By the name that the files give them."""


def content(dataset: str, split: str) -> Content:
    """Random, but the same in every call."""
    rng = np.random.default_rng([len(dataset), len(split)])
    num = NUM_IMAGES[split]
    kinds = {"labels": 10} if dataset == "cifar10" else {"coarse_labels": 20, "fine_labels": 100}
    labels = {kind: rng.integers(0, limit, num, dtype=np.uint8) for kind, limit in kinds.items()}
    return Content(rng.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8), labels)


def write(dataset: str, version: str, folder: Path) -> Path:
    """Write all files of the dataset into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    end = ".bin" if version == "binary" else ""
    for split in ("train", "test"):
        images, labels = content(dataset, split)
        pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        if dataset == "cifar100":
            names = [f"{split}{end}"]
        else:
            names = [f"test_batch{end}"] if split == "test" else [f"data_batch_{n}{end}" for n in range(1, 6)]
        for part, name in zip(np.split(np.arange(len(images)), len(names)), names, strict=True):
            chosen = {kind: values[part] for kind, values in labels.items()}
            if version == "binary":
                data = np.column_stack([*chosen.values(), pixels[part]]).tobytes()
            else:
                data = pickled(batch(pixels[part], chosen))
            (folder / name).write_bytes(data)
    for name, data in class_names(dataset, version).items():
        (folder / name).write_bytes(data)
    return folder


def batch(pixels: np.ndarray, labels: dict[str, Any]) -> dict[bytes, Any]:
    """The content of a file of the Python version."""
    lists = {kind.encode(): list(map(int, values)) for kind, values in labels.items()}
    names = [b"image_%d.png" % number for number in range(len(pixels))]
    return {b"batch_label": b"a batch", **lists, b"data": pixels, b"filenames": names}


def class_names(dataset: str, version: str) -> dict[str, bytes]:
    if version == "python":
        if dataset == "cifar10":
            return {"batches.meta": pickled(meta())}
        names = {b"fine_label_names": [n.encode() for n in FINE], b"coarse_label_names": [n.encode() for n in COARSE]}
        return {"meta": pickled(names)}
    files = {"batches.meta.txt": CIFAR10} if dataset == "cifar10" else {}
    if dataset == "cifar100":
        files = {"fine_label_names.txt": FINE, "coarse_label_names.txt": COARSE}
    return {name: ("\n".join(lines) + "\n\n").encode() for name, lines in files.items()}


def meta() -> dict[bytes, Any]:
    return {
        b"num_cases_per_batch": 10000,
        b"label_names": [name.encode() for name in CIFAR10],
        b"num_vis": 3072,
    }


def pack(folder: Path, archive: Path) -> Path:
    """Pack `folder` as a `.tar.gz`, with the files in reverse order."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name, recursive=False)
        for path in sorted(folder.iterdir(), reverse=True):
            tar.add(path, f"{folder.name}/{path.name}")
    return archive


def pickled(value: Any) -> bytes:
    """What Python 2's cPickle writes with protocol 2."""
    out, memo = bytearray(b"\x80\x02"), 0

    def put() -> None:
        nonlocal memo
        memo += 1
        out.extend(b"q%c" % memo if memo < 256 else b"r" + memo.to_bytes(4, "little"))

    def several(items: list[Any], end: bytes) -> None:
        for start in range(0, len(items), 2000 if end == b"u" else 1000):
            out.extend(b"(")
            for item in items[start : start + (2000 if end == b"u" else 1000)]:
                save(item)
            out.extend(end)

    def save(value: Any) -> None:
        match value:
            case dict():
                out.extend(b"}")
                put()
                several([part for item in value.items() for part in item], b"u")
            case list():
                out.extend(b"]")
                put()
                several(value, b"e")
            case bytes():
                size = len(value)
                out.extend(b"U%c" % size if size < 256 else b"T" + size.to_bytes(4, "little"))
                out.extend(value)
                put()
            case int():
                number = value
                small = b"K%c" % number if 0 <= number < 256 else b""
                medium = b"M" + number.to_bytes(2, "little") if 256 <= number < 2**16 else b""
                out.extend(small or medium or b"J" + number.to_bytes(4, "little", signed=True))
            case np.ndarray():
                array(value)

    def array(value: np.ndarray) -> None:
        for text in (b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n"):
            out.extend(text)
            put()
        out.extend(b"K\0\x85U\x01b\x87R")
        put()
        out.extend(b"(K\x01")
        for size in value.shape:
            save(size)
        out.extend(b"\x86cnumpy\ndtype\n")
        put()
        out.extend(b"U\x02" + value.dtype.str[1:].encode() + b"K\0K\x01\x87R")
        put()
        is_fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        out.extend(b"(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0tb" + (b"\x88" if is_fortran else b"\x89"))
        raw = value.tobytes("A")
        out.extend(b"T" + len(raw).to_bytes(4, "little") + raw + b"tb")

    save(value)
    return bytes(out) + b"."
