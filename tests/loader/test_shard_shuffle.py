"""A loader that keeps shards together resumes anywhere, on any ranks, and refuses a position of another order."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kd_pipeline import ShardShuffle
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.calibration import images_key
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.workflows._record import RecordSettings, record
from tests import recordings
from tests.streams import assert_same, fields, global_rows, run

ENDS = np.array([0, 11, 12, 12, 37])
SHUFFLE = ShardShuffle(buffer=8)


class ShardedPixels(Arrays):
    """Images with their own number as color, in four shards."""

    def __init__(self, path: Path, shard_ends: NDArray[np.int64] = ENDS) -> None:
        super().__init__(path)
        self.shard_ends = shard_ends


class ShardedPhotos(ImageFolder):
    """Photographs as if they were in four shards."""

    shard_ends = ENDS


def sharded_photos(root: str, classes: tuple[str, ...] | None = None) -> ShardedPhotos:
    """For a config."""
    return ShardedPhotos(root, classes=classes)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixels") / "images.npy"
    pixels = np.arange(37, dtype=np.uint8)[:, None, None, None]
    np.save(path, np.broadcast_to(pixels, (37, 16, 16, 3)))
    return path


def open_loader(source: Any, **options: Any) -> KDDataLoader:
    settings = {"batch_size": 4, "seed": 5, "shuffle": SHUFFLE, "device": "cpu", **options}
    return KDDataLoader(source, EvalTransform(size=16), **settings)


def test_batches_are_in_the_order_of_the_plan(path: Path) -> None:
    with open_loader(ShardedPixels(path)) as loader:
        for epoch in range(3):
            found = torch.cat([batch.index for batch in loader])
            wanted = loader.plan.epoch(epoch).indices(np.arange(37))
            assert found.tolist() == wanted.tolist() and sorted(found.tolist()) == list(range(37))


def test_resume_at_every_batch(path: Path) -> None:
    source, seen, states = ShardedPixels(path), [], []
    with open_loader(source, repeats=2) as loader:
        for _ in range(2):
            for batch in loader:
                seen.append(fields(batch))
                states.append(loader.state_dict())
    assert len(seen) == 20
    for number, state in enumerate(states, start=1):
        with open_loader(source, repeats=2) as loader:
            loader.load_state_dict(state)
            assert_same(run(loader, 2), seen[number:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_order_of_one(path: Path, world_size: int) -> None:
    source = ShardedPixels(path)
    with open_loader(source, batch_size=8) as loader:
        whole = global_rows([run(loader, 2)])
    ranks = []
    for rank in range(world_size):
        with open_loader(source, batch_size=8 // world_size, shard=Shard(rank, world_size)) as loader:
            ranks.append(run(loader, 2))
            assert len(ranks[-1]) == len(ranks[0])
    assert_same([row for row in global_rows(ranks) if row["valid"]], whole)


def test_global_is_true(path: Path) -> None:
    with open_loader(Arrays(path), shuffle="global") as named, open_loader(Arrays(path), shuffle=True) as plain:
        plain.load_state_dict(named.state_dict())
        assert_same(run(named, 1), run(plain, 1))


@pytest.mark.parametrize(
    ("shuffle", "ends", "lines"),
    [
        (True, ENDS, {"shuffle": "'shards mixed over 8 samples' → True", "shards": "'4 shards, "}),
        (ShardShuffle(buffer=9), ENDS, {"shuffle": "'shards mixed over 8 samples' → 'shards mixed over 9 samples'"}),
        (SHUFFLE, np.array([0, 12, 37]), {"shards": "'4 shards, "}),
    ],
    ids=["kind", "buffer", "shards"],
)
def test_position_of_another_order_is_refused(path: Path, shuffle: Any, ends: Any, lines: Mapping[str, str]) -> None:
    with open_loader(ShardedPixels(path)) as loader:
        state = loader.state_dict()
    with open_loader(ShardedPixels(path, ends), shuffle=shuffle) as loader:
        with pytest.raises(StateError, match="a different stream of batches") as caught:
            loader.load_state_dict(state)
        found = dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines() if " → " in line)
        assert found.keys() == lines.keys()
        assert all(found[name].startswith(line) for name, line in lines.items())
        loader.load_state_dict(state, allow=lines)


def test_source_without_shards_is_refused_with_advice(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this source has none.*set shuffle to true"):
        open_loader(Arrays(path))
    open_loader(Arrays(path), shuffle=True).close()


def test_wrong_shuffle_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shuffle must be True.*got 'shards'"):
        open_loader(ShardedPixels(path), shuffle="shards")


def test_images_of_a_calibration_depend_on_the_order(path: Path) -> None:
    def key(shuffle: Any, ends: NDArray[np.int64] = ENDS) -> str:
        return images_key(ShardedPixels(path, ends), EvalTransform(size=16), seed=5, shuffle=shuffle)

    others = [key(True), key(False), key(ShardShuffle(buffer=9)), key(SHUFFLE, np.array([0, 12, 37]))]
    assert key("global") == key(True) and len({key(SHUFFLE), *others}) == 5


@pytest.fixture(scope="module")
def recorded(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The changes of a config, and the recording that was made with them."""
    source = {"kind": "custom", "factory": f"{__name__}:sharded_photos", "kwargs": {"root": str(photo_folder)}}
    options = {"source": source, "shuffle": SHUFFLE.model_dump()}
    plugins = [*recordings.PLUGINS, __name__]
    out = tmp_path_factory.mktemp("recorded") / "recording"
    yield options, record(recordings.config(photo_folder, **options), RecordSettings(out=out), plugins=plugins)


def replaying(photo_folder: Path, recording: Path, **options: Any) -> KDDataLoader:
    config = recordings.config(photo_folder, teacher={"path": recording, "verify": 5}, **options)
    return KDDataLoader.from_config(config, plugins=[*recordings.PLUGINS, __name__])


def test_recording_has_the_order_of_its_run(photo_folder: Path, recorded: tuple[Any, Path]) -> None:
    options, recording = recorded
    with replaying(photo_folder, recording, **options, batch_size=5) as loader:
        for epoch in range(recordings.NUM_EPOCHS):
            found = [index for batch in loader for index in batch.index.tolist()]
            assert found == loader.plan.epoch(epoch).indices(np.arange(37)).tolist()
    other = options | {"shuffle": {"kind": "shards", "buffer": 9}}
    with pytest.raises(StateError, match="shuffle: 'shards mixed over 8 samples' → 'shards mixed over 9 samples'"):
        replaying(photo_folder, recording, **other)
