"""Batches do not depend on how DALI groups them."""

import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.dali import Graph
from kd_pipeline.data.plan import Plan
from kd_pipeline.data.reader import INDEX, VALID, ReadBatch, Reader, group_size
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.sources import Arrays, ImageFolder
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import Views
from kd_pipeline.errors import BadSampleError
from tests.corpus import cut_in_half
from tests.views import graph_settings

TRAIN = TrainTransform(size=24)
BATCH_SIZE = 4
ARRAYS = Arrays(np.random.default_rng(0).integers(0, 256, (37, 40, 40, 3), dtype=np.uint8))
NUM_BATCHES = 10
"""Batches of the 37 photographs; the last one has a single image."""

Open = Callable[..., Reader]


@pytest.fixture
def open_reader(photo_folder: Path) -> Iterator[Open]:
    """Opens readers of the photographs, or of a different source with 37 images, unshuffled."""
    opened: list[Reader] = []

    def make(root: Path | Arrays = photo_folder, *, prefetch: int = 2, **policy: object) -> Reader:
        source = ImageFolder(root) if isinstance(root, Path) else root
        plan = Plan(num_samples=len(source), batch_size=BATCH_SIZE, seed=3, shuffle=False)
        settings = graph_settings(BATCH_SIZE, prefetch=prefetch)
        opened.append(Reader(source, Views.of(TRAIN), plan, settings, LoaderSettings(**policy)))
        return opened[-1]

    yield make
    for reader in opened:
        reader.close()


def undecodable(path: Path) -> None:
    """Write a truncated PNG with an intact header, so only the decoder fails."""
    png = io.BytesIO()
    Image.fromarray(np.arange(90 * 80 * 3, dtype=np.uint8).reshape(90, 80, 3)).save(png, "PNG")
    path.write_bytes(png.getvalue()[:-30])


def pixels(read: ReadBatch) -> NDArray[np.float32]:
    return np.array(read.group.views[IMAGES])[read.rows]


def group_sizes(reads: Iterable[ReadBatch]) -> list[int]:
    held = list(reads)
    return [len(list(group)) for _, group in itertools.groupby(id(read.group) for read in held)]


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("batch_size", "image_size", "num_batches"),
    [(64, 224, 4), (256, 224, 1), (100, 224, 2), (16, 512, 3), (128, 32, 2), (1, 32, 256), (5000, 8, 1), (8, 33, 1)],
)
def test_group_size_of_small_batches(batch_size: int, image_size: int, num_batches: int) -> None:
    transform = TrainTransform(size=image_size)
    for num_threads, on_gpu in ((1, True), (8, False), (64, False)):
        assert group_size(batch_size, Views.of(transform), num_threads=num_threads, on_gpu=on_gpu) == num_batches


def test_few_threads_get_few_images_at_once() -> None:
    def sizes(num_threads: int) -> list[int]:
        return [
            group_size(batch_size, Views.of(TrainTransform(size=size)), num_threads=num_threads, on_gpu=False)
            for batch_size, size in ((8, 224), (32, 32), (64, 224), (16, 448))
        ]

    assert sizes(1) == [4, 1, 1, 1] and sizes(2) == [8, 2, 1, 1] and sizes(4) == [16, 4, 2, 2]


def test_group_batches_are_aligned_for_engines() -> None:
    for batch_size, size, dtype in itertools.product((1, 3, 8, 20, 64), (17, 24, 32, 33, 224), ("float32", "float16")):
        transform = EvalTransform(size=size, dtype=dtype)
        batch_bytes = batch_size * 3 * size**2 * np.dtype(dtype).itemsize
        num_batches = group_size(batch_size, Views.of(transform), num_threads=8, on_gpu=False)
        assert num_batches == 1 or batch_bytes % 256 == 0
    assert group_size(64, Views.of(EvalTransform(size=33)), num_threads=8, on_gpu=False) == 4


@pytest.mark.parametrize(("sizes", "num_batches"), [((32, 64), 16), ((33, 64), 1), ((64, 33), 1)])
def test_group_batches_are_aligned_at_each_size_that_changes(sizes: tuple[int, ...], num_batches: int) -> None:
    transform = TrainTransform.model_validate({"size": {"choices": sizes}})
    assert group_size(16, Views.of(transform), num_threads=8, on_gpu=True) == num_batches
    assert group_size(16, Views.of(transform), num_threads=8, on_gpu=False) == num_batches


def test_groups_double_after_first_batch(open_reader: Open) -> None:
    reader = open_reader()
    reads = [reader.read(*divmod(number, NUM_BATCHES)) for number in range(2 * NUM_BATCHES)]
    assert group_sizes(reads) == [1, 2, 4, 3, 10]  # no group reaches into the next epoch
    for read in reads:
        assert len(pixels(read)) == read.metadata.shape[1] == len(read.plan.index)


def test_batch_independent_of_first_batch_read(open_reader: Open) -> None:
    reader = open_reader()
    whole = [reader.read(*divmod(number, NUM_BATCHES)) for number in range(2 * NUM_BATCHES)]
    for first in range(2 * NUM_BATCHES - 3):
        other = open_reader(prefetch=1 + first % 3)
        for number in range(first, first + 4):
            read = other.read(*divmod(number, NUM_BATCHES))
            np.testing.assert_array_equal(pixels(read), pixels(whole[number]))
            np.testing.assert_array_equal(read.metadata, whole[number].metadata)
        other.close()


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_random_access(open_reader: Open, photo_folder: Path, stores: str, prefetch: int) -> None:
    source = ARRAYS if stores == "pixels" else photo_folder
    reader, other = open_reader(source), open_reader(source, prefetch=prefetch)
    whole = [pixels(reader.read(0, number)) for number in range(NUM_BATCHES)]
    for number in [0, 1, 2, 1, 1, 7, 8, 3, 4, 5, 9, 0, 6]:
        np.testing.assert_array_equal(pixels(other.read(0, number)), whole[number])
    with pytest.raises(IndexError, match="batch 10"):
        other.read(0, NUM_BATCHES)


@pytest.mark.parametrize("interrupted", [0, 1, 4])
@pytest.mark.parametrize("source", ["files", "pixels"])
def test_interrupt_loses_no_batch(
    open_reader: Open, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, interrupted: int
) -> None:
    """Even if DALI has already returned the images."""
    taken = Graph.take
    of = ARRAYS if source == "pixels" else photo_folder
    reader, whole = open_reader(of), open_reader(of)
    for number in range(NUM_BATCHES):
        wanted = pixels(whole.read(0, number))
        if number == interrupted:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                reader._ready.clear()
                patch.setattr(Graph, "take", lambda graph, stream: (taken(graph, stream), fail(KeyboardInterrupt())))
                reader.read(0, number)
        np.testing.assert_array_equal(pixels(reader.read(0, number)), wanted)


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_source_error_is_raised_again(
    open_reader: Open, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    reader = open_reader(ARRAYS)
    reader.read(0, 0)
    monkeypatch.setattr(Arrays, "read", lambda source, index: fail(error("the server is gone")))
    for _ in range(2):
        with pytest.raises(error, match="the server is gone"):
            for number in range(2 * NUM_BATCHES):
                reader.read(1 + number // NUM_BATCHES, number % NUM_BATCHES)


def test_large_files_are_not_grouped(open_reader: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "class").mkdir()
    for index, image in enumerate(ARRAYS.read(np.arange(37))):
        Image.fromarray(image).save(tmp_path / "class" / f"{index:02}.png")
    for num_batches, groups in ((2, [1, 2, 2, 2, 2, 1]), (1.99, [1] * NUM_BATCHES)):
        monkeypatch.setattr("kd_pipeline.data.reader._GROUP_FILE_PIXELS", num_batches * BATCH_SIZE * 40 * 40)
        reader = open_reader(tmp_path)
        assert group_sizes(reader.read(0, number) for number in range(NUM_BATCHES)) == groups


def test_failed_group_is_read_batch_by_batch(open_reader: Open, photo_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photo_folder, tmp_path / "photos")
    cut_in_half(Path(ImageFolder(root).name(9)))
    reader = open_reader(root, on_bad_sample="substitute", max_bad_fraction=0.2)
    reads = [reader.read(*divmod(number, NUM_BATCHES)) for number in range(2 * NUM_BATCHES)]
    assert group_sizes(reads[:NUM_BATCHES]) == [1] * NUM_BATCHES
    assert group_sizes(reads[NUM_BATCHES:]) == [1, 2, 4, 3]


@pytest.mark.parametrize("number", [0, 3])
def test_failure_without_bad_sample_is_retried(open_reader: Open, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    wanted = [pixels(read) for read in map(open_reader().read, [0] * NUM_BATCHES, range(NUM_BATCHES))]
    take, failures = Graph.take, []

    def fail_once(graph: Graph, stream: object = None) -> object:
        if len(taken) == number and not failures:
            failures.append(number)
            raise RuntimeError("out of memory")
        return take(graph, stream)

    monkeypatch.setattr(Graph, "take", fail_once)
    monkeypatch.setattr("kd_pipeline.data.reader._GROUP_IMAGES", BATCH_SIZE)
    reader, taken = open_reader(), []
    for batch in range(NUM_BATCHES):
        taken.append(pixels(reader.read(0, batch)))
    assert failures == [number] and reader.bad_samples.indices == []
    np.testing.assert_array_equal(np.concatenate(taken), np.concatenate(wanted))


def test_second_failure_names_the_batch(open_reader: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_pipeline.data.reader._GROUP_IMAGES", BATCH_SIZE)
    calls = []
    monkeypatch.setattr(Graph, "take", lambda graph, stream=None: (calls.append(1), fail(RuntimeError("no memory"))))
    reader = open_reader(on_bad_sample="substitute")
    for tries in (2, 4):
        with pytest.raises(RuntimeError, match="no memory") as info:
            reader.read(1, 2)
        assert "batch 3 of epoch 2" in info.value.__notes__[0] and len(calls) == tries


def test_stop_drops_batches_read_ahead(open_reader: Open) -> None:
    reader = open_reader(on_bad_sample="substitute", max_bad_fraction=0.2)
    for number in range(4):
        last = reader.read(0, number)
    assert len(np.array(last.group.views[IMAGES])) > last.rows.stop  # includes batch 4
    reader.stop()
    reader.bad_samples.restore([17])
    after = reader.read(0, 4)
    assert 17 in after.plan.index and 17 not in after.metadata[INDEX] and after.metadata[VALID].sum() == BATCH_SIZE - 1


@pytest.mark.parametrize("bad", [0, 5, 11, 16, 27, 36])
def test_batches_before_bad_file_are_returned(open_reader: Open, photo_folder: Path, tmp_path: Path, bad: int) -> None:
    root = shutil.copytree(photo_folder, tmp_path / "photos")
    cut_in_half(Path(ImageFolder(root).name(bad)))
    reader, whole = open_reader(root), open_reader()
    for number in range(bad // BATCH_SIZE):
        np.testing.assert_array_equal(pixels(reader.read(0, number)), pixels(whole.read(0, number)))
    for _ in range(2):
        with pytest.raises(BadSampleError, match=f"sample {bad}"):
            reader.read(0, bad // BATCH_SIZE)


@pytest.mark.parametrize("spoil", [cut_in_half, undecodable], ids=["no end", "no pixels"])
@pytest.mark.parametrize("bad", [(0,), (5, 6, 16), (36,)])
def test_bad_files_in_group_are_substituted(
    open_reader: Open, photo_folder: Path, tmp_path: Path, bad: tuple[int, ...], spoil: Callable[[Path], object]
) -> None:
    root = shutil.copytree(photo_folder, tmp_path / "photos")
    for index in bad:
        spoil(Path(ImageFolder(root).name(index)))
    options = {"on_bad_sample": "substitute", "max_bad_fraction": 0.2}
    meets, knows = open_reader(root, **options), open_reader(root, **options)
    knows.bad_samples.restore(bad)
    for number in range(NUM_BATCHES):
        met, known = meets.read(0, number), knows.read(0, number)
        np.testing.assert_array_equal(pixels(met), pixels(known))
        np.testing.assert_array_equal(met.metadata[VALID], ~np.isin(met.plan.index, bad))
        assert not np.isin(met.metadata[INDEX], bad).any()
    assert meets.bad_samples.indices == list(bad)
