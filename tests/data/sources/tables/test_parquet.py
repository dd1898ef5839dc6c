"""Parquet files: the same samples as from a folder, whoever wrote them, and every failure with its file and row."""

import gc
import logging
import os
import re
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import ImageFolder, Parquet, open_source
from kd_pipeline.data.sources.base import SourceSettings
from kd_pipeline.data.sources.custom import check_source
from kd_pipeline.data.sources.tables import parquet_files
from kd_pipeline.data.sources.tables.parquet_files import ParquetFiles
from kd_pipeline.errors import BadSampleError, DataError, StorageError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.storage import StoreSettings
from tests.data.sources.helpers import error_of
from tests.data.sources.table_files import contents, read_all, table_of, write_parquet
from tests.http_server import serve_folder
from tests.streams import TRAIN, assert_same, conv_teacher, run, state_after

NAMES = ("flower", "roof", "sky")


@pytest.fixture(scope="module")
def files(photo_folder):
    return ImageFolder(photo_folder)


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """Three files of row groups of four images; read only."""
    return write_parquet(table_of(files), tmp_path_factory.mktemp("parquet"))


def write(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def stream(source, **options):
    options = {"batch_size": 8, "seed": 5, "on_bad_sample": "raise", **options}
    with KDDataLoader(source, TRAIN, conv_teacher(), **options) as loader:
        return run(loader, 2)


# The same samples


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("struct", {"compression": "snappy"}),
        ("struct", {"compression": "zstd", "data_page_version": "2.0", "write_page_checksum": True}),
        ("struct", {"compression": "none", "use_dictionary": False}),
        ("struct", {"write_statistics": False, "store_schema": False}),
        ("binary", {"compression": "gzip"}),
        ("large_binary", {}),
        ("dictionary", {}),
    ],
    ids=str,
)
def test_images_are_those_of_the_files(files, tmp_path, kind, options):
    source = Parquet(write_parquet(table_of(files, kind), tmp_path, **options))
    assert read_all(check_source(source, "mine")) == contents(files)
    assert source.labels.dtype == np.int64 and (source.labels == files.labels).all() and source.num_classes == 3
    assert source.shard_ends.tolist() == [0, 12, 24, 37] and source.classes is None and source.warnings == ()
    assert repr(source) == "Parquet(37 images, 3 classes)"


def test_batches_are_those_of_the_folder(files, folder):
    source = Parquet(folder, classes=files.classes)
    assert source.classes == files.classes
    assert_same(stream(source), stream(files))


def test_any_order_and_repeated_indices(files, folder):
    source, wanted = Parquet(folder), contents(files)
    index = np.array([36, 0, 12, 11, 36, 23, 24])
    assert [image.tobytes() for image in source.read(index)] == [wanted[row] for row in index]


def test_resumed_at_every_batch(folder):
    shuffle = ShardShuffle(buffer=6)
    wanted = stream(Parquet(folder), shuffle=shuffle)
    for number in range(len(wanted) // 2 + 1):
        options = {"batch_size": 8, "seed": 5, "shuffle": shuffle}
        with KDDataLoader(Parquet(folder), TRAIN, conv_teacher(), **options) as loader:
            state = state_after(loader, number) if number else loader.state_dict()
        with KDDataLoader(Parquet(folder), TRAIN, conv_teacher(), **options) as loader:
            loader.load_state_dict(state)
            assert_same(run(loader, 2), wanted[number:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_see_each_sample_once(folder, size):
    seen = []
    for rank in range(size):
        with KDDataLoader(
            Parquet(folder),
            TRAIN,
            batch_size=4,
            shard=Shard(rank, size),
            last_batch="pad",
            shuffle=ShardShuffle(buffer=8),
        ) as loader:
            seen += [int(index) for batch in loader for index in batch.index[batch.valid]]
    assert sorted(seen) == list(range(37))


def test_pandas_writes_the_same(files, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"picture": contents(files), "cls": [NAMES[label] for label in files.labels]})
    frame.to_parquet(tmp_path / "a.parquet")
    source = Parquet(tmp_path / "a.parquet")
    assert read_all(source) == contents(files) and source.classes == NAMES
    assert (source.labels == files.labels).all() and source.name(3) == "a.parquet[3]"


def test_datasets_writes_names_of_classes(files, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "label": datasets.ClassLabel(names=["c", "b", "a"]),
        "image": datasets.Image(decode=False),
        "data": datasets.Value("binary"),
    })  # fmt: skip
    rows = {
        "image": [{"bytes": image, "path": f"{row}.jpg"} for row, image in enumerate(contents(files))],
        "label": files.labels.tolist(),
        "data": [b""] * len(files),
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet", batch_size=10)
    source = Parquet(tmp_path / "a.parquet")
    assert source.classes == ("c", "b", "a") and (source.labels == files.labels).all()
    assert read_all(source) == contents(files) and source.name(3) == "a.parquet[3] (3.jpg)"
    assert Parquet(tmp_path / "a.parquet", labeled=False).labels is None


# Which files


def test_files_by_pattern_list_and_folder(files, folder):
    paths = [folder / f"train-{number:05}-of-00003.parquet" for number in range(3)]
    for path in (paths, folder / "*.parquet", str(folder / "train-{00000..00002}-of-00003.parquet"), f"{folder}/"):
        assert len(Parquet(path)) == 37
    assert Parquet(paths[1:]).name(13) == f"train-00002-of-00003.parquet[1] ({Path(files.name(25)).name})"


@pytest.fixture
def repository(files, tmp_path):
    """A repository with two splits."""
    table = table_of(files)
    write_parquet(table, tmp_path / "data")
    pq.write_table(table.slice(0, 5), tmp_path / "data" / "validation-00000-of-00001.parquet")
    return tmp_path


def test_split_by_the_names_of_files(repository):
    assert len(Parquet(repository, split="train")) == 37
    assert len(Parquet(repository, split="val")) == len(Parquet(repository / "data", split="validation")) == 5
    assert len(Parquet(repository / "data" / "*.parquet", split="dev")) == 5
    assert "has the splits train, validation; set split" in error_of(Parquet, repository)
    assert "has no split 'test'" in error_of(Parquet, repository, split="test")


CARD = """---
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': sky, '1': sea, '2': sun}}}}
configs:
- config_name: default
  data_files:
  - {split: mine, path: data/train-*}
  - {split: other, path: [data/val*]}
---
# A dataset
"""


def test_split_and_names_by_the_card(repository):
    (repository / "README.md").write_text(CARD)
    source = Parquet(repository, split="mine")
    assert len(source) == 37 and source.classes == ("sky", "sea", "sun")
    assert len(Parquet(repository, split="other")) == 5
    assert "has the splits mine, other" in error_of(Parquet, repository)


@pytest.mark.parametrize(
    "text", ["# no front matter", "---\n[1, 2\n---", "---\nconfigs: 3\n---", "---\nconfigs: [{}]\n---"]
)
def test_other_cards_are_ignored(repository, text):
    (repository / "README.md").write_text(text)
    assert len(Parquet(repository, split="train")) == 37


# Which columns


def test_columns_that_may_be_meant_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", a=[b"1"], b=[b"2"], label=[0], cls=[1])
    assert "the columns a, b may be the images; set image_column" in error_of(Parquet, path)
    assert "the columns label, cls may be the labels; set label_column" in error_of(Parquet, path, image_column="a")
    source = Parquet(path, image_column="b", label_column="cls")
    assert read_all(source) == [b"2"] and source.labels.tolist() == [1]
    assert Parquet(path, image_column="b", labeled=False).labels is None


def test_missing_column_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", image=[b"1"], x=["text"])
    assert "no column 'imag' for image_column; did you mean 'image'?" in error_of(Parquet, path, image_column="imag")
    assert "no column 'y' for label_column" in error_of(Parquet, path, label_column="y")
    other = write(tmp_path / "b.parquet", picture=[b"1"])
    message = error_of(Parquet, [path, other])
    assert message.startswith(f"{other}: no column 'image', which {path} has; its columns are picture")
    assert "no column has encoded images" in error_of(Parquet, write(tmp_path / "c.parquet", x=["text"]))


@pytest.mark.parametrize(
    ("images", "part"),
    [
        (["aGVsbG8="], "it holds text: decode base64"),
        ([[1, 2]], "it holds lists, such as decoded pixels"),
        ([{"path": "a.jpg"}], "it holds struct<path: string>; write the encoded image as bytes"),
        ([1.5], "it holds double"),
    ],
)
def test_images_that_are_no_bytes(tmp_path, images, part):
    path = write(tmp_path / "a.parquet", image=images)
    assert part in error_of(Parquet, path, image_column="image")


# Labels


def labels_of(tmp_path, labels, **options):
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    return Parquet(write(tmp_path / "a.parquet", image=[b"1"] * len(labels), label=labels), **options)


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int32(), pa.bool_(), None], ids=str)
def test_labels_of_any_integer_type(tmp_path, kind):
    labels = pa.array([1, 0, 1])
    labels = labels.dictionary_encode() if kind is None else labels.cast(kind)
    assert labels_of(tmp_path, labels).labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_labels_that_are_names(tmp_path, kind):
    source = labels_of(tmp_path, pa.array(["dog", "cat", "dog"]).cast(kind))
    assert source.labels.tolist() == [1, 0, 1] and source.classes == ("cat", "dog")
    assert Parquet(tmp_path / "a.parquet", classes=["dog", "bird", "cat"]).labels.tolist() == [0, 2, 0]
    message = error_of(Parquet, tmp_path / "a.parquet", classes=["dogs", "cat"])
    assert "a.parquet: the label 'dog' of row 0 is not among the 2 classes; did you mean 'dogs'?" in message


def test_labels_that_are_none(tmp_path):
    assert "row 1 has no label (label is null, as in 1 of 2 rows)" in error_of(labels_of, tmp_path, [0, None])
    assert "are double, and should be integers or text" in error_of(labels_of, tmp_path, [0.0, 1.0])
    assert "the label -1 of row 1 is not a class index" in error_of(labels_of, tmp_path, [0, -1])
    assert "the label 3 of row 1 is not a class index from 0 to 1" in error_of(
        labels_of, tmp_path, [0, 3], classes=["a", "b"]
    )
    hidden = labels_of(tmp_path, [-1, -1])
    assert hidden.labels is None and "all labels are -1" in hidden.warnings[0]


def test_names_in_the_metadata_are_mapped_to_those_of_the_training_data(tmp_path, files):
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    names = (
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}, "image": {"_type": "Image"}}}}'
    )
    table = pa.table({"image": [b"1", b"2"], "label": [0, 1]}, schema.with_metadata({"huggingface": names}))
    pq.write_table(table, tmp_path / "a.parquet")
    settings = TypeAdapter(SourceSettings).validate_python({"kind": "parquet", "path": str(tmp_path / "a.parquet")})
    assert open_source(settings).classes == ("a", "b")
    source = open_source(settings, classes=["b", "c", "a"])
    assert source.labels.tolist() == [2, 0] and source.num_classes == 3
    with pytest.raises(DataError, match="its metadata names the class 'b', which is not among"):
        open_source(settings, classes=["a", "bb"])


# What is wrong with a sample or a file


def test_null_images_are_unreadable_samples(files, tmp_path):
    table = table_of(files)
    images = table["image"].to_pylist()
    images[3], images[17] = None, {"bytes": None, "path": "a/b.jpg"}
    table = table.set_column(0, "image", pa.array(images, table.schema.field("image").type))
    source = Parquet(write_parquet(table, tmp_path))
    with KDDataLoader(source, TRAIN, batch_size=8, on_bad_sample="substitute", max_bad_fraction=0.1) as loader:
        valid = {int(index): bool(ok) for batch in loader for index, ok in zip(batch.index, batch.valid, strict=True)}
        bad = {sample.index: (sample.path, sample.num_bytes, sample.reason) for sample in loader.bad_samples}
    assert 3 not in valid or not all(valid.values())
    assert bad[3] == ("train-00000-of-00003.parquet[3]", None, "the row has no image (null)")
    assert bad[17][0] == "train-00001-of-00003.parquet[5] (a/b.jpg)"
    assert "no image but the path 'a/b.jpg', and files beside the table are not read" in bad[17][2]
    with pytest.raises(
        BadSampleError, match=r"train-00000-of-00003\.parquet\[3\] \(no such file\): the row has no image"
    ):
        stream(source, shuffle=False)


def test_table_of_paths_only_is_refused(tmp_path):
    images = pa.array([{"bytes": None, "path": "a.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    message = error_of(Parquet, write(tmp_path / "a.parquet", image=images))
    assert "no row has an image, as 'image.bytes' is null in all" in message and "kind: file_list" in message


def test_no_parquet_file_is_named(tmp_path, folder):
    path = tmp_path / "a.parquet"
    path.write_bytes(next(folder.iterdir()).read_bytes()[:-100])
    assert re.match(rf"{path}: cannot be read as a Parquet file \(.*; if it was cut off", error_of(Parquet, path))
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "it is a ZIP archive" in error_of(Parquet, path)
    path.write_bytes(b"")
    assert "cannot be read as a Parquet file" in error_of(Parquet, path)
    with pytest.raises(StorageError, match=r"gone\.parquet: no such file"):
        Parquet(tmp_path / "gone.parquet")
    (tmp_path / "empty").mkdir()
    assert "no .parquet files in or below" in error_of(Parquet, tmp_path / "empty")
    assert "it has no rows" in error_of(Parquet, write(path, image=pa.array([], pa.binary())))


def test_damaged_row_group_is_named(files, tmp_path):
    write_parquet(table_of(files), tmp_path, num_files=1, compression="zstd", write_page_checksum=True)
    path = next(tmp_path.iterdir())
    source = Parquet(path)
    chunk = pq.read_metadata(path).row_group(2).column(0)
    place = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 8)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(source.read(np.arange(8))) == 8
    with pytest.raises(StorageError, match=rf"{path}: row group 2 cannot be decoded .*; copy the file again"):
        source.read(np.array([9]))


def test_footers_that_would_end_the_process_are_errors(files, tmp_path):
    """Arrow ends it where Python asks for what such a footer says about a column chunk."""
    content = next(write_parquet(table_of(files).slice(0, 2), tmp_path, num_files=1).iterdir()).read_bytes()
    size, refused = int.from_bytes(content[-8:-4], "little"), []
    for place in range(len(content) - 8 - size, len(content) - 8):
        if len(refused) == 4:
            break
        damaged = bytearray(content)
        damaged[place] ^= 1
        with suppress(OSError, pa.ArrowException):
            footer = pq.read_metadata(pa.BufferReader(damaged))
            try:
                parquet_files._check_chunks(footer, len(content))
            except Exception:
                refused.append(damaged)
    assert refused
    for damaged in refused:
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        assert "cannot be read as a Parquet file" in error_of(Parquet, tmp_path / "damaged.parquet")


@pytest.mark.parametrize("cut", [True, False])
def test_changed_file_is_named(files, tmp_path, cut):
    path = next(write_parquet(table_of(files), tmp_path, num_files=1).iterdir())
    source = Parquet(path)
    source.read(np.array([0]))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if cut else content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StorageError, match=f"{path}: it has changed since it was opened"):
        source.read(np.array([30]))


# Reading


class Counter:
    """Counts the row groups that are decoded, and how many at the same time."""

    def __init__(self, patch):
        self.groups = []
        self.lock = threading.Lock()
        read = ParquetFiles.read

        def counted(files, file, columns, group=None):
            if group is not None and columns[0].endswith("bytes"):
                with self.lock:
                    self.groups.append((file, group))
            return read(files, file, columns, group)

        patch.setattr(ParquetFiles, "read", counted)


def test_row_group_is_decoded_once_by_all_threads(folder, monkeypatch):
    source, counter = Parquet(folder), Counter(monkeypatch)
    threads = [threading.Thread(target=source.read, args=(np.arange(37),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counter.groups) == len(set(counter.groups)) == 10


def test_opening_decodes_no_images_and_is_cached(files, tmp_path, monkeypatch):
    path, counter = write_parquet(table_of(files), tmp_path / "data"), Counter(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = Parquet(path)
    assert counter.groups == []
    with monkeypatch.context() as patch:
        patch.setattr(ParquetFiles, "_read_footer", lambda files, file: pytest.fail("a footer was read again"))
        again = Parquet(path)
        assert (again.labels == first.labels).all() and again.shard_ends.tolist() == first.shard_ends.tolist()
        assert len(Parquet(path, split="train")) == 37
    assert Parquet(path).fingerprint == first.fingerprint
    write_parquet(table_of(files).slice(0, 30), path)
    assert len(Parquet(path)) == 30


def test_damaged_index_is_not_used(files, tmp_path, monkeypatch):
    path = write_parquet(table_of(files), tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Parquet(path)
    (index,) = (tmp_path / "cache").rglob("*.index")
    content = bytearray(index.read_bytes())
    content[-2] ^= 1
    index.write_bytes(content)
    assert (Parquet(path).labels == files.labels).all()


def test_shards_are_read_once_in_an_epoch(folder, monkeypatch):
    source, counter = Parquet(folder), Counter(monkeypatch)
    source.read(np.array([0]))
    size = int(source._index.sizes.max())
    source, counter.groups = Parquet(folder, memory=6 * size), []
    options = {"batch_size": 4, "shuffle": ShardShuffle(buffer=4), "last_batch": "keep"}
    with KDDataLoader(source, TRAIN, **options, prefetch=1, num_threads=1) as loader:
        batches = iter(loader)
        for _ in range(len(loader)):
            next(batches)
    first = counter.groups[:10]
    assert len(set(first)) == 10  # what comes after is of the next epoch


def test_memory_is_bounded(folder):
    size = int(Parquet(folder)._index.sizes.max())
    source = Parquet(folder, memory=3 * size)
    for index in np.random.default_rng(0).permutation(37):
        source.read(np.array([index]))
        assert source._groups.num_bytes <= 3 * size
    source.expect(np.arange(37))


def test_row_group_is_dropped_once_all_its_images_were_read(folder):
    source = Parquet(folder, memory=2**30)
    source.read(np.arange(len(source)))
    assert source._groups.num_bytes == source._index.sizes.sum()  # all fit, and the next epoch needs them again
    source = Parquet(folder, memory=int(source._index.sizes.sum()) - 1)
    source.read(np.arange(len(source) - 2))  # the last image is a row group of its own
    assert source._groups.num_bytes == source._index.sizes[-2]
    source.read(np.arange(len(source) - 2, len(source)))
    assert source._groups.num_bytes == 0


def test_nothing_else_keeps_images_in_memory(folder):
    """Arrow keeps some errors of Python for as long as there are frames that they hold."""
    gc.collect()
    before = pa.total_allocated_bytes()
    source = Parquet(folder, memory=1)
    for start in range(0, len(source), 4):
        source.read(np.arange(start, min(start + 4, len(source))))
    gc.collect()
    assert pa.total_allocated_bytes() == before


def test_images_of_much_memory_are_copies(folder):
    size = int(Parquet(folder)._index.sizes.max())
    few, many = Parquet(folder, memory=size), Parquet(folder, memory=100 * size)
    assert few.read(np.array([0]))[0].base is None
    image = many.read(np.array([0]))[0]
    assert image.base is not None and not image.flags.writeable
    wanted = image.tobytes()
    del many
    gc.collect()
    assert image.tobytes() == wanted


def test_expected_row_groups_are_decoded_ahead(folder, monkeypatch):
    source, counter = Parquet(folder), Counter(monkeypatch)
    source.expect(np.arange(20))
    for _ in range(500):
        if len(counter.groups) == 5:
            break
        threading.Event().wait(0.01)
    assert set(counter.groups) == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    source.read(np.arange(20))
    assert len(counter.groups) == 5


def test_reading_again_and_again_is_a_warning(files, tmp_path, caplog):
    path = write_parquet(table_of(files), tmp_path, num_files=1, row_group_size=10)
    memory = int(Parquet(path)._index.sizes.max())
    once, again = Parquet(path, memory=memory), Parquet(path, memory=memory)
    with caplog.at_level(logging.WARNING, "kd_pipeline"):
        caplog.clear()
        for _ in range(300):
            once.read(np.array([0]))
        assert not caplog.messages
        for row in range(600):
            again.read(np.array([row * 10 % 37]))
    (message,) = caplog.messages
    assert "reading is slow, as each row group of 9 images is decoded for 1." in message
    assert "Set shuffle: {kind: shards, buffer: " in message


def test_small_memory_is_a_warning(folder):
    (warning,) = Parquet(folder, memory=1000).warnings
    assert "a row group has" in warning and "set memory to at least four times" in warning


def test_fingerprint_covers_images_and_labels_and_not_the_place(files, folder, tmp_path):
    table = table_of(files)
    same = Parquet(write_parquet(table, tmp_path / "same", compression="zstd")).fingerprint
    assert same == Parquet(folder).fingerprint
    assert Parquet(folder, labeled=False).fingerprint != same
    images = table["image"].to_pylist()
    images[20]["bytes"] += b"\0"
    changed = table.set_column(0, "image", pa.array(images, table.schema.field("image").type))
    assert Parquet(write_parquet(changed, tmp_path / "changed")).fingerprint != same


def test_in_a_fork_it_is_read_again(files, folder):
    source = Parquet(folder)
    source.read(np.arange(10))
    source._groups._owner = -1
    source._groups._lock.acquire()  # as if another thread held it while the process was forked
    assert read_all(source) == contents(files)


# Behind URLs


@pytest.fixture
def web(files, tmp_path):
    write_parquet(table_of(files), tmp_path / "tables")
    with serve_folder(tmp_path) as server:
        yield server


QUICK = StoreSettings(deadline_s=5.0, retries=1, cache_size=0)


def test_each_row_group_is_one_request(files, web):
    source = Parquet(f"{web.url}/tables", storage=QUICK)
    web.requests.clear()
    assert read_all(source) == contents(files) and len(web.requests) == 10
    assert source.name(13) == f"train-00001-of-00003.parquet[1] ({Path(files.name(13)).name})"


def test_files_that_fit_into_the_cache_are_downloaded_whole(files, web, tmp_path):
    settings = StoreSettings(deadline_s=5.0, cache_dir=tmp_path / "cache")
    Parquet(f"{web.url}/tables", storage=settings).expect(np.arange(37))
    for _ in range(100):  # until they are there
        web.requests.clear()
        assert read_all(Parquet(f"{web.url}/tables", storage=settings)) == contents(files)
        read = {request.range for request in web.requests if request.path.endswith(".parquet")}
        if read == {"bytes=0-0"}:  # whether they have changed
            return
        threading.Event().wait(0.05)
    pytest.fail(f"they are still read in ranges: {read}")


def test_store_that_fails_is_no_bad_sample(web):
    source = Parquet(f"{web.url}/tables/train-00000-of-00003.parquet", storage=QUICK)
    web.fail(500, times=9)
    with pytest.raises(StorageError, match=r"train-00000-of-00003\.parquet, byte 4: ") as info:
        source.read(np.array([0]))
    assert info.value.offset == 4
    web.recover()
    assert len(source.read(np.array([0]))) == 1


def test_file_that_has_changed_behind_a_url(web):
    source = Parquet(f"{web.url}/tables/train-00000-of-00003.parquet", storage=QUICK)
    web.etags["/tables/train-00000-of-00003.parquet"] = '"another"'
    with pytest.raises(StorageError, match="it has changed since it was indexed"):
        source.read(np.array([0]))


def test_settings():
    read = TypeAdapter(SourceSettings).validate_python
    settings = read({"kind": "parquet", "path": ["s3://me:secret@bucket/a.parquet", "b.parquet"], "memory": "2 GB"})
    assert "secret" not in repr(settings) and settings.path[1] == Path("b.parquet")
    assert "are in different stores" in error_of(open_source, settings)
    with pytest.raises(ValueError, match="should be a number of bytes"):
        read({"kind": "parquet", "path": "a", "memory": "much"})
