"""What changes the fingerprint of a source, and what does not."""

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import Arrays, FileList, ImageFolder
from kd_pipeline.data.sources.files import paths
from kd_pipeline.data.sources.fingerprint import pieces
from kd_pipeline.data.sources.pixels import arrays
from tests.data.sources.helpers import make_files, write_list


def twenty_files(root: Path) -> Path:
    return make_files(root, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(10)))


def test_copy_has_the_same_fingerprint(tmp_path):
    twenty_files(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there/below")
    for path in (tmp_path / "there/below").rglob("*.jpg"):
        os.utime(path, (1, 1))
    assert ImageFolder(tmp_path / "here").fingerprint == ImageFolder(tmp_path / "there/below").fingerprint
    for folder, absolute in (("here", False), ("there/below", True)):
        rows = [str(tmp_path / folder / "cat/1.jpg") if absolute else "cat/1.jpg"]
        write_list(tmp_path / folder, "\n".join(rows))
    assert FileList(tmp_path / "here/list.csv").fingerprint == FileList(tmp_path / "there/below/list.csv").fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "cat/3.jpg").write_text("CAT/3.jpg"),
        lambda root: (root / "dog/9.jpg").write_text("dog/9.jpg "),
        lambda root: (root / "cat/3.jpg").rename(root / "cat/33.jpg"),
        lambda root: (root / "dog/9.jpg").rename(root / "dog/X.jpg"),
        lambda root: (root / "cat/3.jpg").rename(root / "dog/33.jpg"),
        lambda root: (root / "cat").rename(root / "caty"),
        lambda root: (root / "cat/3.jpg").unlink(),
        lambda root: make_files(root, "cat/new.jpg"),
    ],
)
def test_every_change_counts_in_small_folders(tmp_path, change):
    before = ImageFolder(twenty_files(tmp_path)).fingerprint
    change(tmp_path)
    assert ImageFolder(tmp_path).fingerprint != before


def test_labels_classes_and_shape_count(tmp_path, pixels):
    twenty_files(tmp_path)
    prints = [
        ImageFolder(tmp_path).fingerprint,
        ImageFolder(tmp_path, classes=("dog", "cat")).fingerprint,
        ImageFolder(tmp_path, classes=("cat", "dog", "eel")).fingerprint,
        ImageFolder(tmp_path, labeled=False).fingerprint,
        Arrays(pixels).fingerprint,
        Arrays(pixels, np.zeros(7, int)).fingerprint,
        Arrays(pixels, np.ones(7, int)).fingerprint,
        Arrays(pixels, np.ones(7, int), classes=("a", "b")).fingerprint,
        Arrays(pixels[::-1], np.ones(7, int)).fingerprint,
        Arrays(pixels.reshape(7, 5, 4, 3), np.ones(7, int)).fingerprint,
        Arrays(pixels[:6], np.ones(6, int)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_large_files_are_sampled_but_all_sizes_count(tmp_path):
    names = [f"cat/{number}.jpg" for number in range(4)]
    make_files(tmp_path, *names)
    for name in names:  # 4 x 40 MiB without using the disk: every third file is read
        os.truncate(tmp_path / name, 40 * 2**20)
    before = ImageFolder(tmp_path).fingerprint

    def changed(name: str) -> bool:
        with (tmp_path / name).open("r+b") as file:
            file.write(b"X")
        return ImageFolder(tmp_path).fingerprint != before

    assert not changed("cat/1.jpg") and not changed("cat/2.jpg")
    os.truncate(tmp_path / "cat/1.jpg", 40 * 2**20 + 1)
    assert changed("cat/1.jpg")
    os.truncate(tmp_path / "cat/1.jpg", 40 * 2**20)
    assert not changed("cat/1.jpg") and changed("cat/3.jpg")


def test_many_files_sample_sizes_but_all_paths_count(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.FilesOnDisk, "max_sizes", 8)  # of 20 files, so every third
    before = ImageFolder(twenty_files(tmp_path)).fingerprint

    def changed(name: str) -> bool:
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content + " longer")
        after = ImageFolder(tmp_path).fingerprint
        (tmp_path / name).write_text(content)
        return after != before

    assert [number for number in range(10) if changed(f"cat/{number}.jpg")] == [0, 3, 6, 9]
    (tmp_path / "cat/1.jpg").rename(tmp_path / "cat/1.jpeg")
    assert ImageFolder(tmp_path).fingerprint != before


def test_large_array_is_sampled_evenly():
    images = np.zeros((160, 1024, 1024), np.uint8)  # 160 MiB: every third image is read
    before = Arrays(images).fingerprint
    images[1] = 1
    assert Arrays(images).fingerprint == before
    images[159, -1, -1] = 1
    assert Arrays(images).fingerprint != before


def test_missing_and_special_files_count(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "cat/2.jpg")
    path = write_list(tmp_path, "cat/1.jpg\ncat/2.jpg\ncat/3.jpg\ncat\npipe\n")
    os.mkfifo(tmp_path / "pipe")
    before = FileList(path).fingerprint
    assert FileList(path).fingerprint == before
    make_files(tmp_path, "cat/3.jpg")
    assert FileList(path).fingerprint != before
    (tmp_path / "cat/3.jpg").unlink()
    assert FileList(path).fingerprint == before
    (tmp_path / "cat/3.jpg").touch()
    assert FileList(path).fingerprint != before


def test_unreadable_file_counts_as_missing(tmp_path, monkeypatch):
    make_files(tmp_path, "cat/1.jpg", "cat/2.jpg")
    path = write_list(tmp_path, "cat/1.jpg\ncat/2.jpg\n")
    real = os.open

    def refuse(name, *args, **kwargs):  # root, as whom tests often run, may read everything
        if os.fsdecode(name).endswith("2.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(name, *args, **kwargs)

    source = FileList(path)
    monkeypatch.setattr(os, "open", refuse)
    unreadable = source.fingerprint
    monkeypatch.undo()
    (tmp_path / "cat/2.jpg").unlink()
    assert FileList(path).fingerprint == unreadable


def test_data_is_never_modified(tmp_path):
    twenty_files(tmp_path)
    write_list(tmp_path, "cat/1.jpg,cat\n")

    def listing() -> list[tuple[str, int, int]]:
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*"))

    before = listing()
    for source in (ImageFolder(tmp_path), FileList(tmp_path / "list.csv")):
        source.read(np.arange(len(source)))
        assert source.fingerprint
    assert listing() == before


def test_long_file_counts_by_its_start_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_MAX_CONTENT", 1000)
    file = make_files(tmp_path, "cat/1.jpg", "cat/2.jpg") / "cat/1.jpg"
    file.write_bytes(bytes(3000))
    before = ImageFolder(tmp_path).fingerprint
    for at, size, is_same in ((2000, 3000, True), (2999, 3000, True), (999, 3000, False), (2000, 3001, False)):
        content = bytearray(size)
        content[at] = 1
        file.write_bytes(content)
        assert (ImageFolder(tmp_path).fingerprint == before) == is_same


def test_file_of_a_terabyte_is_not_read_to_its_end(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "cat/2.jpg")
    os.truncate(tmp_path / "cat/1.jpg", 2**40)
    assert len(ImageFolder(tmp_path).fingerprint) == 64


def test_many_tiny_images_are_sampled(monkeypatch):
    monkeypatch.setattr(arrays, "_MAX_ROWS", 100)
    monkeypatch.setattr(arrays, "sampling_step", lambda num_bytes: 2)
    images = np.zeros((1000, 2, 2), np.uint8)
    before = Arrays(images).fingerprint
    images[[1, 2, 999]] = 1
    assert Arrays(images).fingerprint == before
    images[990] = 1
    assert Arrays(images).fingerprint != before


def test_array_in_a_file_has_the_fingerprint_of_one_in_memory(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (1000, 5, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    for step in (1, 3):
        monkeypatch.setattr(arrays, "sampling_step", lambda num_bytes, step=step: step)
        prints = set()
        for block in (1, 500, 2**24):
            monkeypatch.setattr(arrays, "_BLOCK_BYTES", block)
            prints |= {Arrays(images).fingerprint, Arrays(tmp_path / "images.npy").fingerprint}
        assert len(prints) == 1


def resident_bytes() -> int:
    """What this process has in memory of files that it maps."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:")]
    return int(line.split()[1]) * 1024


def test_mapped_array_is_read_in_pieces_that_do_not_stay_in_memory(tmp_path):
    size = 2**26
    (tmp_path / "file").write_bytes(bytes(range(256)) * (size // 256))
    with (tmp_path / "file").open("rb") as file:
        array = np.frombuffer(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[8:], np.int64)
    before, most, total = resident_bytes(), 0, 0
    for piece in pieces(array):
        total += int(piece.view(np.uint8).sum(dtype=np.int64))
        most = max(most, resident_bytes() - before)
    assert total == 255 * size // 2 - sum(range(8))
    assert most < 2**25 and resident_bytes() - before < 2**22
    assert [part.tolist() for part in pieces(np.arange(3))] == [[0, 1, 2]]
