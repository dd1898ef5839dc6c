import inspect
import json
import multiprocessing
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kd_pipeline.bench import BenchLoaderSettings, BenchResult, bench_loader
from kd_pipeline.bench import loaders as room
from kd_pipeline.bench import photographs as photographs_room
from kd_pipeline.bench.loaders import LOADERS, LoadTask
from kd_pipeline.bench.photographs import make_photographs
from kd_pipeline.data.decode_trial import DecodeTrial
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import ConfigError, DataError, MissingPackageError

NUM_FILES, BATCH_SIZE, SIZE = 24, 12, 48
TRANSFORM = TrainTransform(size=SIZE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def numbered(photos: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photographs; green rises from left to right, and blue is flat and says which one it is: 10 * number + 5."""
    root = tmp_path_factory.mktemp("numbered")
    for number in range(NUM_FILES):
        photo = photos[number % 2][number : number + 180, number : number + 240].copy()
        photo[..., 1] = np.linspace(0, 255, 240)
        photo[..., 2] = 10 * number + 5
        path = root / f"class {number // 12}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(path, quality=95, subsampling=0)
    return root


@pytest.fixture(params=LOADERS, scope="module")
def batches(request: pytest.FixtureRequest, numbered: Path) -> Iterator[list[Tensor]]:
    """The first three epochs of every loader, two batches each."""
    stream = LOADERS[request.param](LoadTask(numbered, TRANSFORM, BATCH_SIZE, 1, CPU))
    yield [next(stream) for _ in range(6)]
    stream.close()


def pixels(batches: list[Tensor]) -> Tensor:
    """The images of all batches without their normalization, from 0 to 255."""
    mean, std = torch.tensor(TRANSFORM.mean).view(3, 1, 1), torch.tensor(TRANSFORM.std).view(3, 1, 1)
    return 255 * (torch.cat(batches) * std + mean)


def test_every_loader_gives_whole_dense_float32_batches(batches: list[Tensor]) -> None:
    for images in batches:
        assert type(images) is Tensor
        assert (images.shape, images.dtype) == ((BATCH_SIZE, 3, SIZE, SIZE), torch.float32)
        assert images.device.type == "cpu" and images.is_contiguous()


def test_every_loader_gives_normalized_photographs(batches: list[Tensor]) -> None:
    assert pixels(batches).min() > -1 and pixels(batches).max() < 256
    red = pixels(batches)[:, 0]
    assert red.min() < 20 and red.max() > 235, "from dark to bright"
    assert red.flatten(1).std(dim=1).mean() > 10, "there is something to see"


def test_every_loader_crops_and_flips_at_random(batches: list[Tensor]) -> None:
    green = pixels(batches)[:, 1].mean(dim=1)
    rise = (green[:, -1] - green[:, 0]) / 255
    assert 0.25 < (rise < 0).float().mean() < 0.75, "about half of the views are flipped"
    assert 0.2 < rise.abs().min() < 0.4 and 0.8 < rise.abs().max() <= 1, "widths from a small part to the whole"


def test_no_loader_gives_the_same_view_twice(batches: list[Tensor]) -> None:
    images = torch.cat(batches).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


def test_every_loader_reads_each_file_of_the_folder_once_an_epoch_in_new_order(batches: list[Tensor]) -> None:
    numbers = ((pixels(batches)[:, 2].mean(dim=(1, 2)) - 5) / 10).round().int().tolist()
    epochs = [numbers[start : start + NUM_FILES] for start in range(0, len(numbers), NUM_FILES)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_FILES))] * 3
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(NUM_FILES))}) == 4


@pytest.mark.parametrize("name", ["KDDataLoader", "bare DALI graph"])
def test_batches_are_whole_where_the_files_do_not_divide(name: str, numbered: Path) -> None:
    stream = LOADERS[name](LoadTask(numbered, TRANSFORM, 10, 1, CPU))
    assert [len(next(stream)) for _ in range(7)] == [10] * 7
    stream.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchResult, list[str], Path]:
    """A very short run without a folder, its lines of progress, and the folder that it ran in."""
    lines: list[str] = []
    here = tmp_path_factory.mktemp("here")
    settings = BenchLoaderSettings(
        batch_size=8, size=33, num_batches=2, repeats=2, num_threads=1, out=here / "a/b.json"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(photographs_room, "make_photographs", lambda root: make_photographs(root, num_files=20))
        return bench_loader(settings, report=lines.append), lines, here


def test_every_loader_has_a_row_with_a_figure_for_each_repeat(measured: tuple[BenchResult, list[str], Path]) -> None:
    rows = measured[0].rows
    assert [row.name for row in rows] == list(LOADERS) and rows[0].name == "KDDataLoader"
    for row in rows:
        assert len(row.images_per_s) == len(row.cpu_s_per_image) == len(row.peak_memory_bytes) == 2
        assert min(row.images_per_s) > 0 and min(row.peak_memory_bytes) > 2**26


def test_a_folder_that_is_large_enough_gets_rows_for_a_batch_as_on_a_gpu_also_of_dali_alone(
    numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["KDDataLoader", "bare DALI graph"]
    monkeypatch.setattr(room, "LOADERS", {name: LOADERS[name] for name in names})
    for large, batch_size, expected in [(NUM_FILES, 12, 4), (NUM_FILES + 1, 12, 2), (12, 12, 2)]:
        monkeypatch.setattr(room, "_LARGE_BATCH", large)
        settings = BenchLoaderSettings(
            root=numbered, batch_size=batch_size, size=16, num_batches=1, repeats=1, num_threads=1
        )
        rows = bench_loader(settings).rows
        assert [row.name for row in rows] == [*names, *(f"{name}, batch of {large}" for name in names)][:expected]
        assert all(own > 0 for row in rows for own in row.own_s_per_batch)


def test_the_result_says_what_it_was_measured_with(measured: tuple[BenchResult, list[str], Path]) -> None:
    result, _, here = measured
    assert result.settings == {
        "root": "data/photographs",
        "batch_size": 8,
        "size": 33,
        "num_batches": 2,
        "repeats": 2,
        "num_threads": 1,
        "device": "cpu",
        "decode": [],
        "decode_auto": "window",
        "hw_decoder_loads": [],
        "out": str(here / "a/b.json"),
    }


def test_the_json_file_holds_the_result(measured: tuple[BenchResult, list[str], Path]) -> None:
    result, _, here = measured
    text = (here / "a/b.json").read_text()
    assert text == result.to_json() + "\n"
    assert len(json.loads(text)["rows"]) == 4


def test_progress_is_reported(measured: tuple[BenchResult, list[str], Path]) -> None:
    _, lines, _ = measured
    assert "data/photographs" in lines[0]
    assert lines[1].startswith("20 files")
    assert [line[:13] for line in lines[-2:]] == ["repeat 1 of 2", "repeat 2 of 2"]


def test_no_worker_is_left_when_it_is_over(measured: tuple[BenchResult, list[str], Path]) -> None:
    assert not [worker for worker in multiprocessing.active_children() if "DataLoader" in worker.name]


def test_every_loader_is_closed_when_measuring_fails(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Generator[Tensor, None, None]] = []
    for name, open_stream in LOADERS.items():

        def remember(*arguments: Any, open_stream: Any = open_stream) -> Generator[Tensor, None, None]:
            opened.append(open_stream(*arguments))
            return opened[-1]

        monkeypatch.setitem(LOADERS, name, remember)
    monkeypatch.setattr(room, "measure", None)
    with pytest.raises(TypeError):
        bench_loader(BenchLoaderSettings(root=photographs))
    assert [inspect.getgeneratorstate(stream) for stream in opened] == [inspect.GEN_CLOSED] * 4


@pytest.mark.parametrize(("asked", "num_threads", "timed"), [(20, 2, 20), (20, 3, 24), (1, 16, 16), (5, 1, 8)])
def test_each_worker_of_torch_makes_equally_many_of_the_timed_batches_and_dali_whole_groups(
    asked: int, num_threads: int, timed: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}
    monkeypatch.setattr(room, "measure", lambda contenders, **options: got.update(options))
    bench_loader(BenchLoaderSettings(root=photographs, num_batches=asked, num_threads=num_threads))
    assert got["num_batches"] == timed


@pytest.mark.parametrize("num_threads", [1, 2, 16])
def test_more_batches_go_by_untimed_than_anyone_has_ready(
    num_threads: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}
    monkeypatch.setattr(room, "measure", lambda contenders, **options: got.update(options))
    bench_loader(BenchLoaderSettings(root=photographs, num_threads=num_threads))
    assert got["num_warm_up"] > 2 * num_threads and got["num_warm_up"] >= 4 * 4


def test_each_load_of_a_gpus_decoder_gets_rows_of_its_own(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[LoadTask] = []

    def remember(task: LoadTask) -> Generator[Tensor, None, None]:
        tasks.append(task)
        return (tensor for tensor in ())

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(room, "resolve_device", lambda device: gpu)

    def find(decode: str, *, device_id: int, hw_decoder_load: float) -> str:
        assert (decode, device_id) == ("auto", 0)
        if hw_decoder_load == 1:
            raise ConfigError("this GPU decodes pictures in neither way")
        return "full" if hw_decoder_load else "window"

    def trial(way: str, *, device_id: int) -> DecodeTrial:
        return DecodeTrial(decode=way, hw_decoder_load=0, works=way == "full", detail="crashed with SIGSEGV")

    monkeypatch.setattr(room, "resolve_decode", find)
    monkeypatch.setattr(room, "try_decoding", trial)
    monkeypatch.setattr(room, "LOADERS", dict.fromkeys(LOADERS, remember))
    monkeypatch.setattr(room, "measure", lambda contenders, **options: [one.name for one in contenders])
    lines: list[str] = []
    settings = BenchLoaderSettings(root=photographs, decode=("window", "full"), hw_decoder_loads=(0, 0.75, 1))
    names = bench_loader(settings, report=lines.append)
    assert lines[-2] == "no rows for decode window: windows: crashed with SIGSEGV"
    assert lines[-1] == "no rows for hw_decoder_load 1: this GPU decodes pictures in neither way"
    assert names == [
        *LOADERS,
        "KDDataLoader, decode full",
        "bare DALI graph, decode full",
        "KDDataLoader, hw_decoder_load 0",
        "bare DALI graph, hw_decoder_load 0",
        "KDDataLoader, hw_decoder_load 0.75",
        "bare DALI graph, hw_decoder_load 0.75",
    ]
    assert [task.hw_decoder_load for task in tasks] == [0] * 8 + [0.75] * 2
    assert [task.decode for task in tasks] == ["window"] * 4 + ["full"] * 2 + ["window"] * 2 + ["full"] * 2
    assert all(task.device == gpu for task in tasks)


def test_each_way_to_decode_gets_rows_of_its_own(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOADERS", {name: LOADERS[name] for name in ("KDDataLoader", "bare DALI graph")})
    monkeypatch.setattr(room, "measure", lambda contenders, **options: {one.name: one.run(1) for one in contenders})
    settings = BenchLoaderSettings(root=photographs, batch_size=8, size=16, num_threads=1, decode=("window", "full"))
    assert bench_loader(settings) == {
        "KDDataLoader": 8,
        "bare DALI graph": 8,
        "KDDataLoader, decode window": 8,
        "bare DALI graph, decode window": 8,
        "KDDataLoader, decode full": 8,
        "bare DALI graph, decode full": 8,
    }


def test_a_hardware_decoder_of_a_cpu_is_refused(photographs: Path) -> None:
    with pytest.raises(ConfigError, match="only a GPU has a hardware decoder"):
        bench_loader(BenchLoaderSettings(root=photographs, device="cpu", hw_decoder_loads=(0.5,)))


def test_a_file_that_is_no_jpeg_is_refused_by_name(photo_folder: Path) -> None:
    with pytest.raises(DataError, match=r"/flower/00\.png: only JPEG files"):
        bench_loader(BenchLoaderSettings(root=photo_folder))


def test_a_folder_too_small_for_one_batch_is_refused(photographs: Path) -> None:
    with pytest.raises(DataError, match="40 samples make no whole batch of 64"):
        bench_loader(BenchLoaderSettings(root=photographs))


def test_a_folder_as_the_result_file_is_refused_before_anything_is_measured(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_loader(BenchLoaderSettings(root=photographs, out=tmp_path))


def test_without_torchvision_the_error_says_what_to_install_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingPackageError, match=r"torchvision .* pip install 'kd_pipeline\[bench\]'"):
        bench_loader(BenchLoaderSettings())
    assert list(tmp_path.iterdir()) == []
