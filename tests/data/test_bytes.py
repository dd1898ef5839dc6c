"""Sources that store bytes: the same stream as that of files, at any thread count, batch size and rank, also after a
resume, and with the same policy for unreadable samples."""

import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_pipeline import BaseSource, ShardShuffle
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.sources.custom import check_source
from kd_pipeline.data.sources.encoded import fingerprint_of_bytes
from kd_pipeline.errors import BadSampleError, DataError
from kd_pipeline.loader.loader import KDDataLoader
from tests.corpus import BROKEN, cut_in_half, photo_of
from tests.rare_files import RARE
from tests.streams import EVAL, TRAIN, assert_same, conv_teacher, global_rows, run, state_after


class Store(BaseSource):
    """The bytes of the files of another source."""

    def __init__(self, files, *, threads=8, fails_at=None):
        super().__init__(len(files), files.labels, classes=files.classes)
        self.files, self.content_threads, self.fails_at = files, threads, fails_at
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def content(self, index):
        with self.lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            if index == self.fails_at:
                raise ConnectionError("the store is gone")
            path = Path(self.files.name(index))
            return path.read_bytes() if path.exists() else None
        finally:
            with self.lock:
                self.running -= 1


def stream(source, **options):
    with KDDataLoader(source, TRAIN, conv_teacher(), **{"batch_size": 8, "seed": 5, **options}) as loader:
        return run(loader, 2)


@pytest.fixture(scope="module")
def wanted(photo_folder):
    return stream(ImageFolder(photo_folder))


@pytest.mark.parametrize("options", [{}, {"prefetch": 1}, {"num_threads": 1}, {"ahead": 2}], ids=str)
def test_stream_of_bytes_is_that_of_files(photo_folder, wanted, options):
    assert_same(stream(Store(ImageFolder(photo_folder)), **options), wanted)


def test_content_is_called_one_at_a_time_if_asked(photo_folder, wanted):
    source = Store(ImageFolder(photo_folder), threads=1)
    assert_same(stream(source), wanted)
    assert source.most_running == 1


class Shards(Store):
    """In three shards; it remembers what it was told to expect and then to read."""

    def __init__(self, files):
        super().__init__(files)
        self.shard_ends = np.array([0, 10, 25, len(files)])
        self.expected, self.late = set(), []

    def expect(self, indices):
        self.expected.update(indices.tolist())

    def content(self, index):
        if index not in self.expected:
            self.late.append(index)
        return super().content(index)


@pytest.mark.parametrize("shuffle", [False, ShardShuffle(buffer=12)], ids=["none", "shards"])
def test_source_is_told_what_comes_where_shards_stay_together(photo_folder, shuffle):
    source = Shards(ImageFolder(photo_folder))
    assert_same(stream(source, shuffle=shuffle), stream(Shards(ImageFolder(photo_folder)), shuffle=shuffle))
    assert source.expected == set(range(len(source)))
    assert set(source.late) == {0}  # it is checked when the source is opened


def test_source_is_told_nothing_of_a_uniform_order(photo_folder):
    source = Shards(ImageFolder(photo_folder))
    stream(source)
    assert not source.expected


def test_resumed_at_every_batch(photo_folder, wanted):
    source = Store(ImageFolder(photo_folder))
    with KDDataLoader(source, TRAIN, conv_teacher(), batch_size=8, seed=5) as loader:
        for number in range(len(loader) + 1):
            state = state_after(loader, number) if number else loader.state_dict()
            loader.load_state_dict(state)
            assert_same(run(loader, 2), wanted[number:])
            loader.load_state_dict({**state, "epoch": 0, "batch": 0})


def test_ranks_see_each_sample_once(photo_folder):
    source = Store(ImageFolder(photo_folder))
    one, two = (
        global_rows(
            [stream(source, batch_size=8 // size, shard=Shard(rank, size), last_batch="drop") for rank in range(size)]
        )
        for size in (1, 2)
    )
    assert_same(one, two)


def test_rare_kinds_are_read(photos, tmp_path):
    (tmp_path / "a").mkdir()
    for name, (encode, _) in RARE.items():
        (tmp_path / "a" / f"{name}.png").write_bytes(encode(photo_of(photos)))
    files = ImageFolder(tmp_path)
    found, wanted = (pixels(source) for source in (Store(files), files))
    assert_same(found, wanted)


def pixels(source):
    with KDDataLoader(source, EVAL, batch_size=7, shuffle=False) as loader:
        return run(loader, 1)


# Samples that cannot be read


def bad_samples(source):
    """All that cannot be read, of a source whose last sample can."""
    with KDDataLoader(source, TRAIN, batch_size=8, on_bad_sample="substitute", max_bad_fraction=1.0) as loader:
        run(loader, 1)
        return {bad.index: (bad.num_bytes, bad.reason) for bad in loader.bad_samples}


def test_same_reasons_as_of_files(photos, tmp_path):
    """Of every kind of broken file that has content."""
    (tmp_path / "a").mkdir()
    for number, broken in enumerate(BROKEN):
        broken.put(tmp_path / "a" / f"{number:02}{Path(broken.name).suffix}", photo_of(photos))
    Image.fromarray(photo_of(photos)).save(tmp_path / "a" / "99.png")
    files = ImageFolder(tmp_path)
    found, wanted = bad_samples(Store(files)), bad_samples(files)
    assert found.keys() == wanted.keys() and len(wanted) > 20
    for number, (num_bytes, reason) in wanted.items():
        if num_bytes and os.path.isfile(files.name(number)):
            assert found[number] == (num_bytes, reason)


def test_sample_without_content(damaged):
    source = Store(damaged)
    os.remove(damaged.name(3))
    with pytest.raises(BadSampleError, match=r"sample 3 cannot be read: Store\[3\] \(no such file\): content\(\)"):
        stream(source)


def test_substitutes_are_those_of_files(damaged):
    os.remove(damaged.name(3))
    cut_in_half(Path(damaged.name(8)))
    options = {"on_bad_sample": "substitute", "max_bad_fraction": 0.2}
    assert_same(stream(Store(damaged), **options), stream(damaged, **options))


def test_store_that_fails_ends_the_loop(photo_folder):
    source = Store(ImageFolder(photo_folder), fails_at=20)
    with KDDataLoader(source, TRAIN, batch_size=8, shuffle=False, on_bad_sample="substitute") as loader:
        batches = iter(loader)
        assert [next(batches).index[0] for _ in range(2)] == [0, 8]
        with pytest.raises(ConnectionError, match="the store is gone"):
            next(batches)
        assert loader.bad_samples == ()
        source.fails_at = None
        state = loader.state_dict()
        loader.load_state_dict(state)
        assert [int(batch.index[0]) for batch in loader] == [16, 24, 32]


# The source itself


@pytest.mark.parametrize(
    ("content", "message"), [("text", "returned an object of type str"), (np.zeros(3), "returned float64 [3]")]
)
def test_content_that_is_no_bytes(content, message):
    class Wrong(BaseSource):
        def content(self, index):
            return content

    with pytest.raises(DataError, match=re.escape(message)):
        check_source(Wrong(2), "mine")


def test_fingerprint_covers_content_labels_and_missing_samples(damaged):
    source = Store(damaged)
    first = source.fingerprint
    assert Store(damaged).fingerprint == first
    source.labels = source.labels + 1
    changed = [fingerprint_of_bytes(source)]
    cut_in_half(Path(damaged.name(5)))
    changed.append(Store(damaged).fingerprint)
    os.remove(damaged.name(5))
    changed.append(Store(damaged).fingerprint)
    assert len({first, *changed}) == 4


@pytest.fixture
def damaged(photo_folder, tmp_path):
    return ImageFolder(shutil.copytree(photo_folder, tmp_path / "photos"))
