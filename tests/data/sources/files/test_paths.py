"""The table of paths: what `read` returns, and its memory."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.sources import FileList, ImageFolder
from tests.data.sources.helpers import make_files, read_paths, write_list


@pytest.mark.parametrize("elsewhere", [False, True])
def test_batch_equals_single_paths(tmp_path, elsewhere):
    """Of all lengths, the longest last in the list, in any order and more than once; some of them below no root."""
    names = [f"{'long/' * (number % 5)}{'é' * (number % 3)}{number}.jpg" for number in range(40)] + ["last" * 40]
    if elsewhere:
        names[7] = "/somewhere/else.jpg"
    make_files(tmp_path, "0.jpg")  # a list of which no file exists is refused
    source = FileList(write_list(tmp_path, "".join(f"{name}\n" for name in names)))
    index = np.array([40, 0, 7, 7, *range(40), 39])
    for block in (index, index[:1], index[1:2], index[-1:], index[4:20]):
        rows = [os.fsdecode(row.tobytes().rstrip(b"\0")) for row in source.read(block)]
        assert rows == [source.name(position) for position in block.tolist()]
        assert source.read(block).shape[1] == max(len(os.fsencode(row)) for row in rows)


def test_read_pads_paths_in_requested_order(tmp_path):
    root = make_files(tmp_path, "cat/1.jpg", "cat/long name é.jpg", "dog/😀.png")
    source = ImageFolder(root)
    assert read_paths(source, 2, 0, 1, 0) == [source.name(i) for i in (2, 0, 1, 0)]
    assert read_paths(source) == []


def test_file_name_may_be_any_bytes(tmp_path):
    make_files(tmp_path, "cat/1.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff\xfe.jpg")).write_text("x")
    source = ImageFolder(tmp_path)
    row = source.read(np.array([1]))[0]
    assert row.tobytes() == os.fsencode(tmp_path) + b"/cat/\xff\xfe.jpg"
    assert len(source.fingerprint) == 64


def test_dali_reads_these_paths(tmp_path):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    source = ImageFolder(make_files(tmp_path, "cat/1.jpg", "cat/long name é.jpg", "dog/😀.png"))

    @pipeline_def(batch_size=3, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        paths = fn.external_source(source=lambda: source.read(np.array([2, 0, 1])), batch=True)
        return fn.io.file.read(paths)

    pipeline = graph()
    pipeline.build()
    (files,) = pipeline.run()
    assert [bytes(np.array(file)).decode() for file in files] == ["dog/😀.png", "cat/1.jpg", "cat/long name é.jpg"]


def test_memory_is_little_more_than_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "list.csv").write_text("".join(f"class_{n % 100:03}/image_{n:08}.jpg\n" for n in range(50_000)))
    root = make_files(tmp_path / "a/rather/long/root/folder/that/is/kept/once", "class_000/image_00000000.jpg")
    tracemalloc.start()
    try:
        source = FileList(tmp_path / "list.csv", root=root)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / len(source) < len("class_000/image_00000000.jpg") + 20
