"""Tar shards in a loader: the batches are those of the same images as files, and are resumed at any of them."""

from pathlib import Path

import pytest
import torch

from kd_pipeline.data.order import ShardShuffle
from kd_pipeline.data.settings import LoaderOptions
from kd_pipeline.data.sources import ImageFolder, Tar
from kd_pipeline.loader import KDDataLoader
from tests.http_server import serve_folder
from tests.streams import EVAL, TRAIN, conv_teacher, fields, run
from tests.tar_files import folder_as_shards, write_tar

OPTIONS: LoaderOptions = {"device": "cpu", "num_threads": 2}


@pytest.fixture(scope="module")
def shards(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_as_shards(photo_folder, tmp_path_factory.mktemp("shards"), per_shard=10)


def loader_of(source: object, transform: object = TRAIN, **options: object) -> KDDataLoader:
    given = {"batch_size": 5, "seed": 3, "shuffle": True, "teacher": conv_teacher(), **OPTIONS, **options}
    return KDDataLoader(source, transform, **given)


def assert_equal(found, wanted) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("transform", "shuffle"), [(TRAIN, True), (EVAL, False)], ids=["train", "eval"])
def test_batches_are_those_of_the_folder(photo_folder, shards, transform, shuffle):
    found = []
    for source in (ImageFolder(photo_folder), Tar(shards)):
        with loader_of(source, transform, shuffle=shuffle) as loader:
            found.append(run(loader, 2))
    assert_equal(found[1], found[0])
    assert {"images", "labels", "logits"} <= found[0][0].keys()


@pytest.mark.parametrize("shuffle", [True, ShardShuffle(buffer=12)], ids=["global", "shards"])
def test_resumes_at_every_batch(shards, shuffle):
    with loader_of(Tar(shards), shuffle=shuffle) as loader:
        wanted, states = [], []
        for _ in range(2):
            for batch in loader:
                wanted.append(fields(batch))
                states.append(loader.state_dict())
    for done, state in enumerate(states[:-1], start=1):
        with loader_of(Tar(shards), shuffle=shuffle) as loader:
            loader.load_state_dict(state)
            assert_equal([fields(next(iter(loader)))], wanted[done : done + 1])


def test_image_that_is_cut_off_is_substituted(photo_folder, tmp_path):
    files = {}
    for number, path in enumerate(sorted(photo_folder.rglob("*.jpg"))[:6]):
        files |= {f"{number}.cls": b"0", f"{number}.jpg": path.read_bytes()}
    path = write_tar(tmp_path / "a.tar", files)
    source = Tar(path)
    with path.open("r+b") as file:
        file.truncate(int(source._table.starts[-1]) + 99)
    with loader_of(Tar(path), EVAL, shuffle=False, on_bad_sample="substitute", max_bad_fraction=0.2) as loader:
        batches = [fields(batch) for batch in loader]
        (bad,) = loader.bad_samples
    assert torch.cat([batch["valid"] for batch in batches]).tolist()[:6] == [True] * 5 + [False]
    assert (bad.index, bad.path) == (5, "a.tar::5.jpg") and bad.reason.startswith("the archive is cut off")


def test_batches_over_http_are_those_of_local_shards(shards):
    with serve_folder(Path(shards).parent) as server:
        for pattern in ("train-{0000..0003}.tar", "train-*.tar"):
            found = []
            for path in (shards, f"{server.url}/{pattern}"):
                with loader_of(Tar(path)) as loader:
                    found.append(run(loader, 1))
            assert_equal(found[1], found[0])
