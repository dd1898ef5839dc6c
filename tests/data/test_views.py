"""Economy of views: a file is opened once and decoded once, whatever is made of it."""

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kd_pipeline.data.graph_settings import DecodeMode
from kd_pipeline.data.sources import Arrays, ImageFolder, Source, Tar
from kd_pipeline.data.views import EvalView, FollowingView, TrainView
from kd_pipeline.loader.loader import KDDataLoader
from tests.streams import EVAL, SIZE, TRAIN, assert_same, run
from tests.tar_files import folder_as_shards

Views = Mapping[str, FollowingView | TrainView | EvalView]

VIEWS: Views = {
    "large": FollowingView(follow="images", size=SIZE + 8),
    "local": TrainView(size=SIZE // 2, area=(0.05, 0.4), count=3),
    "locals_large": FollowingView(follow="local", size=SIZE),
    "whole": EvalView(size=SIZE),
}
SIZES: Views = {f"{size}": EvalView(size=size, resize=size) for size in (SIZE // 2, SIZE, 2 * SIZE)}
IN_OPEN = 0x20


def open_loader(source: Source, views: Views, *, decode: DecodeMode = "window") -> KDDataLoader:
    transform = EVAL if views is SIZES else TRAIN
    return KDDataLoader(
        source, transform, views=views, batch_size=8, seed=3, device="cpu", num_threads=1, decode=decode
    )


@pytest.fixture(scope="module")
def many(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More files than a loader reads ahead."""
    root = tmp_path_factory.mktemp("many")
    (root / "all").mkdir()
    for path in photo_folder.rglob("*.*"):
        for number in range(12):
            os.link(path, root / "all" / f"{number:02}-{path.name}")
    return root


@contextmanager
def counted_opens(folder: Path) -> Iterator[Counter[str]]:
    """How often each file in `folder` was opened meanwhile."""
    libc, opened = ctypes.CDLL(None, use_errno=True), Counter[str]()
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        assert libc.inotify_add_watch(descriptor, os.fsencode(folder), IN_OPEN) >= 0, os.strerror(ctypes.get_errno())
        yield opened
        events = os.read(descriptor, 2**20)
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            name, events = events[16 : 16 + length].rstrip(b"\0").decode(), events[16 + length :]
            assert mask & IN_OPEN
            opened[name] += 1
    finally:
        os.close(descriptor)


def decoders(loader: KDDataLoader) -> list[str]:
    """The operators that decode, in the pipeline that makes the views."""
    graph = loader._reader._graph
    assert graph is not None
    names = [operator._op._operator_name() for operator in graph._pipeline._ops]
    return [name for name in names if ".decoders." in name]


@pytest.mark.parametrize("decode", ["window", "full"])
@pytest.mark.parametrize("views", [{}, VIEWS, SIZES], ids=["none", "many", "eval"])
def test_each_file_is_opened_and_decoded_once(many: Path, views: Views, decode: DecodeMode) -> None:
    with counted_opens(many / "all") as opened, open_loader(ImageFolder(many), views, decode=decode) as loader:
        names = []
        for batch in islice(loader, 4):
            names += [Path(loader.source.name(index)).name for index in batch.index.tolist()]
        assert len(decoders(loader)) == 1
    assert len(names) == 32 and [opened[name] for name in names] == [1] * 32
    assert set(opened.values()) == {1}, "nor any that was read ahead"


@pytest.mark.parametrize("views", [VIEWS, SIZES], ids=["many", "eval"])
def test_window_and_full_give_the_same_pixels(photo_folder: Path, views: Views) -> None:
    found = []
    for decode in ("window", "full"):
        with open_loader(ImageFolder(photo_folder), views, decode=decode) as loader:
            found.append(run(loader, 2))
    assert_same(*found)
    assert {f"view {name}" for name in views} <= found[0][0].keys()


@pytest.mark.parametrize("views", [VIEWS, SIZES], ids=["many", "eval"])
def test_bytes_give_the_pixels_of_files(photo_folder: Path, tmp_path: Path, views: Views) -> None:
    found = []
    tar = Tar(folder_as_shards(photo_folder, tmp_path, per_shard=10))
    for source in (ImageFolder(photo_folder), tar):
        with open_loader(source, views) as loader:
            found.append(run(loader, 2))
            assert len(decoders(loader)) == 1
    assert_same(*found)


@pytest.mark.parametrize("views", [VIEWS, SIZES], ids=["many", "eval"])
def test_pixels_give_those_of_files(photos: tuple[NDArray[np.uint8], ...], tmp_path: Path, views: Views) -> None:
    """Of lossless files."""
    pixels = np.stack([photos[number % 2][number : number + 70, number : number + 90] for number in range(11)])
    (tmp_path / "files" / "one").mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / "one" / f"{number:02}.png")
    np.savez(tmp_path / "pixels.npz", images=pixels, labels=np.zeros(11, np.int64))
    found = []
    for source in (ImageFolder(tmp_path / "files"), Arrays(tmp_path / "pixels.npz")):
        with open_loader(source, views) as loader:
            found.append(run(loader, 2))
            assert len(decoders(loader)) == (source.stores == "files")
    assert_same(*found)
