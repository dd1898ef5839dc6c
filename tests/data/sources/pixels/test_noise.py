"""Random pixels as a dataset."""

from pathlib import Path

import numpy as np
import pytest

from kd_pipeline import EvalTransform, KDDataLoader, Noise
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources.base import NoiseSettings, open_source
from kd_pipeline.errors import DataError


def test_pixels_are_uniform_and_independent() -> None:
    images = Noise(64, (20, 30)).read(np.arange(64))
    assert images.shape == (64, 20, 30, 3) and images.dtype == np.uint8
    counts = np.bincount(images.reshape(-1), minlength=256)
    assert counts.min() > 0.7 * images.size / 256 and counts.max() < 1.3 * images.size / 256
    flat = images.reshape(64, -1).astype(float)
    assert np.abs(np.corrcoef(flat)[np.triu_indices(64, 1)]).max() < 0.15


def test_image_depends_on_seed_and_index_alone() -> None:
    source = Noise(1000, (9, 7), num_classes=10, seed=3)
    np.testing.assert_array_equal(source.read(np.array([999, 3]))[1], Noise(5, (9, 7), seed=3).read(np.array([3]))[0])
    assert (source.read(np.array([3])) != Noise(1000, (9, 7), seed=4).read(np.array([3]))).mean() > 0.9
    assert source.labels is not None and np.bincount(source.labels).min() > 60
    np.testing.assert_array_equal(source.labels, Noise(1000, (9, 7), num_classes=10, seed=3).labels)


def test_fingerprint_tells_apart_what_differs() -> None:
    sources = [
        Noise(10, (8, 8)),
        Noise(11, (8, 8)),
        Noise(10, (8, 9)),
        Noise(10, (8, 8), seed=1),
        Noise(10, (8, 8), num_classes=2),
        Noise(10, (8, 8), num_classes=2, classes=["a", "b"]),
    ]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert Noise(10, (8, 8)).fingerprint == sources[0].fingerprint


def test_loader_renders_it(tmp_path: Path) -> None:
    data = {"source": {"kind": "noise", "num_images": 10, "size": [32, 48], "num_classes": 3}}
    data["transform"] = {"preset": "eval", "size": 16}
    config = Config.model_validate({"run_dir": tmp_path, "data": {"batch_size": 4, "train": data}})
    with KDDataLoader.from_config(config, split="train") as loader:
        sizes = [(tuple(batch.images.shape), int(batch.valid.sum())) for batch in loader]
    assert sizes[:2] == [((4, 3, 16, 16), 4)] * 2
    with KDDataLoader(Noise(5, (32, 32)), EvalTransform(size=32, resize=32), batch_size=5, shuffle=False) as loader:
        batch = next(iter(loader))
        assert batch.labels is None and batch.images.std() > 0.5


def test_classes_are_those_of_the_training_data() -> None:
    settings = NoiseSettings(num_images=4, size=8, num_classes=2)
    assert open_source(settings, classes=["a", "b"]).classes == ("a", "b")
    with pytest.raises(DataError, match="num_classes is 2, and the training data has 3 classes"):
        open_source(settings, classes=["a", "b", "c"])


@pytest.mark.parametrize("wrong", [(0, (8, 8)), (3, (0, 8)), (3, (2**14, 2**14))])
def test_wrong_sizes_are_refused(wrong: tuple[int, tuple[int, int]]) -> None:
    with pytest.raises(DataError, match="at least one image"):
        Noise(*wrong)
