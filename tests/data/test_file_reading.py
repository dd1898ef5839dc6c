"""Reading of image files: only regular ones, of a limited size, and never a wait that nothing ends."""

import os
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.data.file_kinds import FileKinds
from kd_pipeline.data.file_reading import read_file
from kd_pipeline.data.headers import UnreadableFileError


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_file(os.fsencode(tmp_path / "file"), max_bytes=7).tobytes() == b"content"
    os.mkfifo(tmp_path / "pipe")
    for path, reason in {tmp_path / "pipe": "a pipe", Path("/dev/zero"): "a device", tmp_path: "a directory"}.items():
        with pytest.raises(UnreadableFileError, match=reason):
            read_file(os.fsencode(path), max_bytes=7)
    with pytest.raises(UnreadableFileError, match="No such file"):
        read_file(os.fsencode(tmp_path / "missing"), max_bytes=7)
    with pytest.raises(UnreadableFileError, match="it has 7 bytes, and at most 6 are read"):
        read_file(os.fsencode(tmp_path / "file"), max_bytes=6)


def test_special_files_are_looked_for_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    kinds = FileKinds(orientation="upright", max_pixels=1, num_threads=1)
    names = [tmp_path / "file", tmp_path / "pipe", tmp_path / "missing"] * 300
    paths = np.array([os.fsencode(name) for name in names]).view(np.uint8).reshape(900, -1)
    index = np.arange(900)
    kept = kinds.only_files(index, paths)
    assert (kept[1::3] == 0).all() and (kept[::3] == paths[::3]).all() and (kept[2::3] == paths[2::3]).all()
    looked_at: list[bytes] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (looked_at.append(path), stat(path, **options))[1])
    assert (kinds.only_files(index, paths) == kept).all()
    assert {os.path.basename(path) for path in looked_at} == {b"pipe"}
