"""Datasets of Hugging Face: the same samples as from a folder, as views of Arrow files, and errors with their place."""

import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import HuggingFace, ImageFolder, open_source
from kd_pipeline.data.sources.base import SourceSettings
from kd_pipeline.data.sources.custom import check_source
from kd_pipeline.data.sources.tables import huggingface
from kd_pipeline.errors import StorageError
from kd_pipeline.loader.loader import KDDataLoader
from tests.data.sources.helpers import error_of
from tests.data.sources.table_files import contents, read_all
from tests.streams import TRAIN, assert_same, conv_teacher, run, state_after

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """No progress bars, no network, and a cache of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was opened"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def files(photo_folder):
    return ImageFolder(photo_folder)


def dataset_of(files, **features):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(files.classes)), **features}
    images = [{"bytes": image, "path": os.path.basename(files.name(row))} for row, image in enumerate(contents(files))]
    columns = {"image": images, "label": files.labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture(scope="module")
def dataset(files):
    return dataset_of(files)


@pytest.fixture(scope="module")
def folder(dataset, tmp_path_factory):
    """Three Arrow files; read only."""
    path = tmp_path_factory.mktemp("saved") / "photos"
    dataset.save_to_disk(path, num_shards=3)
    return path


def stream(source, **options):
    with KDDataLoader(source, TRAIN, conv_teacher(), **{"batch_size": 8, "seed": 5, **options}) as loader:
        return run(loader, 2)


def test_saved_dataset_is_the_folder(files, folder):
    source = check_source(HuggingFace(folder), "mine")
    assert read_all(source) == contents(files) and source.classes == files.classes and source.warnings == ()
    assert source.labels.dtype == np.int64 and (source.labels == files.labels).all()
    assert (
        source.name(3) == f"photos[3] ({Path(files.name(3)).name})"
        and repr(source) == "HuggingFace(37 images, 3 classes)"
    )
    assert source.shard_ends.tolist() == [0, 13, 25, 37]
    assert_same(stream(source), stream(files))


def test_images_are_views(folder):
    image = HuggingFace(folder).read(np.array([20]))[0]
    assert image.base is not None and not image.flags.writeable


def test_resumed_within_an_epoch(folder):
    options = {"batch_size": 8, "seed": 5, "shuffle": ShardShuffle(buffer=6)}
    wanted = stream(HuggingFace(folder), shuffle=options["shuffle"])
    for number in (1, 3):
        with KDDataLoader(HuggingFace(folder), TRAIN, conv_teacher(), **options) as loader:
            state = state_after(loader, number)
        with KDDataLoader(HuggingFace(folder), TRAIN, conv_teacher(), **options) as loader:
            loader.load_state_dict(state)
            assert_same(run(loader, 2), wanted[number:])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_see_each_sample_once(folder, size):
    seen = []
    for rank in range(size):
        options = {"batch_size": 4, "shard": Shard(rank, size), "last_batch": "pad"}
        with KDDataLoader(HuggingFace(folder), TRAIN, **options) as loader:
            seen += [int(index) for batch in loader for index in batch.index[batch.valid]]
    assert sorted(seen) == list(range(37))


def test_selected_and_shuffled_rows_of_an_object(files, dataset):
    chosen = dataset.shuffle(seed=3).select([5, 1, 8, 30])
    rows = chosen._indices.column(0).to_pylist()
    source = HuggingFace(chosen)
    assert read_all(source) == [contents(files)[row] for row in rows] and source.shard_ends is None
    assert source.labels.tolist() == [files.labels[row] for row in rows]
    assert source.fingerprint != HuggingFace(dataset).fingerprint


def test_splits(dataset, tmp_path):
    parts = datasets.DatasetDict({"train": dataset.select(range(30)), "val": dataset.select(range(30, 37))})
    parts.save_to_disk(tmp_path)
    assert len(HuggingFace(tmp_path, split="train")) == 30
    assert HuggingFace(tmp_path, split="val").name(0).startswith(f"{tmp_path.name}/val[0]")
    assert "has the splits train, val; set split to one of them" in error_of(HuggingFace, tmp_path)
    assert "has no split 'vall'; did you mean 'val'?" in error_of(HuggingFace, tmp_path, split="vall")


def test_folder_of_a_repository(files, dataset, tmp_path):
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    source = HuggingFace(tmp_path)
    assert read_all(source) == contents(files) and source.classes == files.classes
    assert len(HuggingFace(tmp_path, split="train[:10%]")) == 4
    assert "datasets cannot load it (" in error_of(HuggingFace, tmp_path, split="x")


def test_what_is_no_dataset(tmp_path):
    assert "no such folder" in error_of(HuggingFace, tmp_path / "gone")
    assert "datasets cannot load it (" in error_of(HuggingFace, tmp_path)
    assert "are not read from s3:// URLs; take kind: parquet" in error_of(HuggingFace, "s3://bucket/x")


def test_columns_by_their_features(files):
    both = dataset_of(files).add_column("other", [{"bytes": b"1", "path": None}] * 37)
    assert read_all(HuggingFace(both)) == contents(files)
    assert "the columns image, other may be the images" in error_of(
        HuggingFace, both.cast_column("other", datasets.Image())
    )
    assert "no column 'picture' for image_column" in error_of(HuggingFace, both, image_column="picture")
    assert HuggingFace(both, labeled=False).labels is None


def test_null_images_are_unreadable_samples(files):
    dataset = dataset_of(files)
    images = dataset.data["image"].to_pylist()
    images[3], images[17] = None, {"bytes": None, "path": "a/b.jpg"}
    dataset = dataset.remove_columns("image").add_column("image", images, feature=datasets.Image())
    options = {"batch_size": 8, "on_bad_sample": "substitute", "max_bad_fraction": 0.1}
    with KDDataLoader(HuggingFace(dataset), TRAIN, **options) as loader:
        assert sum(int(batch.valid.sum()) for batch in loader) < len(loader) * 8
        found = {sample.index: (sample.path, sample.reason) for sample in loader.bad_samples}
    assert found[3] == ("dataset[3]", "the row has no image (null)")
    assert found[17][0] == "dataset[17] (a/b.jpg)" and "Dataset.save_to_disk() writes them" in found[17][1]


def test_dataset_of_paths_only_is_refused(files):
    paths = [files.name(row) for row in range(3)]
    dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    message = error_of(HuggingFace, dataset)
    assert "no row has an image" in message and "Dataset.save_to_disk()" in message


def test_file_that_is_cut_off_while_in_use(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    source = HuggingFace(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    os.truncate(path, path.stat().st_size // 2)
    assert len(source.read(np.array([0]))) == 1
    with pytest.raises(StorageError, match="saved, sample 36: an Arrow file was cut off"):
        source.read(np.array([36]))


def test_fingerprint_is_of_the_content(dataset, folder, tmp_path):
    dataset.save_to_disk(tmp_path / "other", num_shards=1)
    state = json.loads((tmp_path / "other" / "state.json").read_text())
    (tmp_path / "other" / "state.json").write_text(json.dumps(state | {"_fingerprint": "another"}))
    assert HuggingFace(tmp_path / "other").fingerprint == HuggingFace(folder).fingerprint


def test_expected_images_are_paged_in(files, folder, monkeypatch):
    asked, done = [], threading.Event()
    monkeypatch.setattr(huggingface, "page_in_later", lambda images: (asked.extend(images), done.set()))
    HuggingFace(folder).expect(np.array([3, 20]))
    assert done.wait(5) and [image.tobytes() for image in asked] == [contents(files)[row] for row in (3, 20)]


def test_by_config(folder, files):
    settings = TypeAdapter(SourceSettings).validate_python({"kind": "huggingface", "path": str(folder)})
    assert open_source(settings).classes == files.classes
    order = ("sky", "roof", "flower")
    source = open_source(settings, classes=order)
    assert source.classes == order and (source.labels == 2 - files.labels).all()
