"""What is no file ends in one message wherever a source takes a path, from Python and from the command line."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.cli import main
from kd_pipeline.data.sources import Arrays, Cifar, FileList, ImageFolder
from kd_pipeline.errors import DataError
from tests.data.sources.helpers import make_files


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # relative, as it has at most 108 bytes


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {"a pipe": os.mkfifo, "a socket": make_socket, "a device": make_device}
PIXELS = np.zeros((2, 4, 4), np.uint8)
SOURCES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "list": ("{{kind: file_list, path: {it}}}", lambda it, folder: FileList(it)),
    "classes of a list": (
        "{{kind: file_list, path: {folder}/list.csv, classes: {it}}}",
        lambda it, folder: FileList(folder / "list.csv", classes=it),
    ),
    "folder": ("{{kind: image_folder, root: {it}}}", lambda it, folder: ImageFolder(it)),
    "classes of a folder": (
        "{{kind: image_folder, root: {folder}, classes: {it}}}",
        lambda it, folder: ImageFolder(folder, classes=it),
    ),
    "images": ("{{kind: arrays, images: {it}}}", lambda it, folder: Arrays(it)),
    "labels": (
        "{{kind: arrays, images: {folder}/images.npy, labels: {it}}}",
        lambda it, folder: Arrays(folder / "images.npy", it),
    ),
    "CIFAR": ("{{kind: cifar10, root: {it}, split: train}}", lambda it, folder: Cifar("cifar10", it, split="train")),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "images.npy", PIXELS)
    return make_files(tmp_path, "cat/1.jpg", "list.csv")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_special_file_is_one_error(folder: Path, kind: str, source: str) -> None:
    it = folder / "it"
    KINDS[kind](it)
    with pytest.raises(DataError) as caught:
        SOURCES[source][1](it, folder)
    message = str(caught.value)
    assert message.startswith(f"{it}: ") and "\n" not in message
    assert f"this is {kind} and no file" in message or source in ("folder", "CIFAR")


@pytest.mark.parametrize("source", SOURCES)
def test_pipe_is_one_line_of_a_command(folder: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    it = folder / "it"
    os.mkfifo(it)
    (folder / "run.yaml").write_text(
        f"run_dir: {folder}/run\ndata:\n  batch_size: 2\n  device: cpu\n  train:\n"
        f"    source: {SOURCES[source][0].format(it=it, folder=folder)}\n    transform: {{preset: train, size: 32}}\n"
    )
    assert main(["check", "-c", str(folder / "run.yaml")]) == 1
    output = "".join(capsys.readouterr())
    assert str(it) in output and "Traceback" not in output
