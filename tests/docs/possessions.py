"""What the pages of docs/journeys presuppose: small photographs, and networks that know them."""

import argparse
import csv
import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from kd_pipeline.models import small_resnet
from tests.forks import Command

CLASSES = ("flower", "temple")
SIZE = 64
NUM_PHOTOS = {"train": 24, "val": 8}
"""Of each class."""


def photos(root: Path) -> None:
    """`root/train/<class>/*.jpg` and `root/val/<class>/*.jpg`."""
    for (split, name, number), content in _jpegs().items():
        path = root / split / name / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def photos_without_classes(root: Path) -> None:
    """`root/*.jpg`, the photographs for training."""
    root.mkdir()
    for (split, name, number), content in _jpegs().items():
        if split == "train":
            (root / f"{name}{number:03}.jpg").write_bytes(content)


def cut_off(path: Path) -> None:
    """Leave half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def csv_files(folder: Path) -> None:
    """`photos/*.jpg` without class folders, and `train.csv` and `val.csv` with a header."""
    (folder / "photos").mkdir()
    rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "val": []}
    for (split, name, number), content in _jpegs().items():
        file = f"{split}_{name}_{number:03}.jpg"
        (folder / "photos" / file).write_bytes(content)
        rows[split].append((str(number), file, name))
    for split, found in rows.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "filename", "class"), *found])


def shards(root: Path) -> None:
    """`train-00000.tar` to `train-00003.tar` and `val-00000.tar`, as WebDataset writes them."""
    root.mkdir()
    for split, num_shards in (("train", 4), ("val", 1)):
        samples = [(key, content) for key, content in _jpegs().items() if key[0] == split]
        for shard in range(num_shards):
            with tarfile.open(root / f"{split}-{shard:05}.tar", "w") as archive:
                for (_, name, number), content in samples[shard::num_shards]:
                    _add(archive, f"{name}{number:03}.jpg", content)
                    _add(archive, f"{name}{number:03}.cls", str(CLASSES.index(name)).encode())


def parquet_files(root: Path) -> None:
    """`train-*.parquet` and `validation-*.parquet`, as `datasets` writes them."""
    from datasets import ClassLabel, Dataset, Features, Image

    root.mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    for split, name in (("train", "train"), ("val", "validation")):
        found = [(key, content) for key, content in _jpegs().items() if key[0] == split]
        columns = {
            "image": [{"bytes": content, "path": None} for _, content in found],
            "label": [CLASSES.index(key[1]) for key, _ in found],
        }
        Dataset.from_dict(columns, features=features).to_parquet(root / f"{name}-00000-of-00001.parquet")


def timm_checkpoint(path: Path) -> None:
    """What timm's train.py leaves: a resnet18 for the two classes, with the arguments of the training."""
    arguments = argparse.Namespace(model="resnet18", num_classes=len(CLASSES), lr=0.1)
    weights = _fitted(timm.create_model("resnet18", num_classes=len(CLASSES))).state_dict()
    torch.save({"epoch": 9, "arch": "resnet18", "state_dict": weights, "args": arguments}, path)


def backbone_weights(path: Path) -> None:
    """Weights of a resnet18 as published on a hub."""
    save_file(_fitted(timm.create_model("resnet18", num_classes=len(CLASSES))).state_dict(), path)


_EXPORT = """
import torch
from kd_pipeline import export_onnx
from kd_pipeline.models import small_resnet

network = small_resnet({num_classes}, width=16)
network.load_state_dict(torch.load("teacher.pt"))
export_onnx(network, "teacher.onnx", image_shape=(3, {size}, {size}))
"""
"""In a fork of a process that has exported before, which takes a tenth of the time."""


def onnx_file(folder: Path) -> None:
    """`teacher.onnx`, a small classifier of the photographs."""
    torch.save(_fitted(small_resnet(len(CLASSES), width=16)).state_dict(), folder / "teacher.pt")
    export = Command([], folder, script=_EXPORT.format(num_classes=len(CLASSES), size=SIZE))
    _, error = export.communicate()
    assert export.returncode == 0, error
    (folder / "teacher.pt").unlink()


@cache
def _jpegs() -> dict[tuple[str, str, int], bytes]:
    """Crops of scikit-learn's two photographs, by split, class and number."""
    temple, flower = load_sample_images().images
    rng = np.random.default_rng(0)
    return {
        (split, name, number): _jpeg(photo, rng)
        for split, num_photos in NUM_PHOTOS.items()
        for number in range(num_photos)
        for name, photo in zip(CLASSES, (flower, temple), strict=True)
    }


def _jpeg(photo: NDArray[np.uint8], rng: np.random.Generator) -> bytes:
    height, width = rng.integers(70, 121, size=2)
    top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
    buffer = io.BytesIO()
    Image.fromarray(photo[top : top + height, left : left + width]).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _fitted(network: nn.Module) -> nn.Module:
    """The network with random features, normalized on the photographs, and a last layer that is fitted to them."""
    keys = [key for key in _jpegs() if key[0] == "train"]
    images = torch.stack([_pixels(_jpegs()[key]) for key in keys])
    signs = 4.0 - 8 * torch.tensor([[name != each for each in CLASSES] for _, name, _ in keys])
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    (head,) = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    features: list[Tensor] = []
    head.register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0]))
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(images)
        network.eval()(images)
        centered = features[-1] - (mean := features[-1].mean(dim=0))
        weight = torch.linalg.solve(centered.T @ centered + torch.eye(len(mean)), centered.T @ signs)
        head.weight.copy_(weight.T)
        head.bias.copy_(-mean @ weight)
    return network


def _pixels(content: bytes) -> Tensor:
    image = Image.open(io.BytesIO(content)).resize((SIZE, SIZE))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(np.array(image)).float() / 255 - mean) / std).permute(2, 0, 1)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
