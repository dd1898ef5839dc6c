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

from benchmarks import loader
from benchmarks.loader import GPU_LOADERS, LOADERS, BenchLoaderSettings, DecodeTask, LoaderResult, bench_loader, main
from kd_pipeline.bench import photographs as photographs_module
from kd_pipeline.bench.measure import Measurement
from kd_pipeline.bench.photographs import make_photographs
from kd_pipeline.bench.torchvision_loaders import why_no_cuda_decoder
from kd_pipeline.data.decode import Decoding
from kd_pipeline.data.decode_trial import DecodeTrial
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import ConfigError, DataError, MissingPackageError

# From 0.29 on, torchvision advises TorchCodec instead.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

NUM_FILES, BATCH_SIZE, SIZE = 24, 12, 48
TRANSFORM = TrainTransform(size=SIZE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def numbered(photos: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photographs; green increases from left to right, and blue is 10 * number + 5 everywhere."""
    root = tmp_path_factory.mktemp("numbered")
    for number in range(NUM_FILES):
        photo = photos[number % 2][number : number + 180, number : number + 240].copy()
        photo[..., 1] = np.linspace(0, 255, 240)
        photo[..., 2] = 10 * number + 5
        path = root / f"class {number // 12}" / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(path, quality=95, subsampling=0)
    return root


@pytest.fixture(params=[*LOADERS, *GPU_LOADERS], scope="module")
def batches(request: pytest.FixtureRequest, numbered: Path) -> Iterator[list[Tensor]]:
    """Three epochs of each loader, two batches each; those for a GPU do the same with torchvision's CPU decoder."""
    stream = (LOADERS | GPU_LOADERS)[request.param](DecodeTask(numbered, TRANSFORM, BATCH_SIZE, 1, CPU))
    yield [next(stream) for _ in range(6)]
    stream.close()


def pixels(batches: list[Tensor]) -> Tensor:
    """The images of all batches without their normalization, from 0 to 255."""
    mean, std = torch.tensor(TRANSFORM.mean).view(3, 1, 1), torch.tensor(TRANSFORM.std).view(3, 1, 1)
    return 255 * (torch.cat(batches) * std + mean)


@pytest.mark.slow
def test_batches_are_full_dense_float32(batches: list[Tensor]) -> None:
    for images in batches:
        assert type(images) is Tensor
        assert (images.shape, images.dtype) == ((BATCH_SIZE, 3, SIZE, SIZE), torch.float32)
        assert images.device.type == "cpu" and images.is_contiguous()


@pytest.mark.slow
def test_images_are_normalized(batches: list[Tensor]) -> None:
    assert pixels(batches).min() > -1 and pixels(batches).max() < 256
    red = pixels(batches)[:, 0]
    assert red.min() < 20 and red.max() > 235, "from dark to bright"
    assert red.flatten(1).std(dim=1).mean() > 10, "there is something to see"


@pytest.mark.slow
def test_random_crops_and_flips(batches: list[Tensor]) -> None:
    green = pixels(batches)[:, 1].mean(dim=1)
    rise = (green[:, -1] - green[:, 0]) / 255
    assert 0.25 < (rise < 0).float().mean() < 0.75, "about half of the views are flipped"
    assert 0.2 < rise.abs().min() < 0.4 and 0.8 < rise.abs().max() <= 1, "widths from a small part to the whole"


@pytest.mark.slow
def test_no_view_repeats(batches: list[Tensor]) -> None:
    images = torch.cat(batches).flatten(1)
    assert len(images.unique(dim=0)) == len(images)


@pytest.mark.slow
def test_each_epoch_reshuffles_every_file(batches: list[Tensor]) -> None:
    numbers = ((pixels(batches)[:, 2].mean(dim=(1, 2)) - 5) / 10).round().int().tolist()
    epochs = [numbers[start : start + NUM_FILES] for start in range(0, len(numbers), NUM_FILES)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_FILES))] * 3
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(NUM_FILES))}) == 4


@pytest.mark.parametrize("name", ["KDDataLoader", "bare DALI graph"])
def test_batches_are_full_if_files_do_not_divide(name: str, numbered: Path) -> None:
    stream = LOADERS[name](DecodeTask(numbered, TRANSFORM, 10, 1, CPU))
    assert [len(next(stream)) for _ in range(7)] == [10] * 7
    stream.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoaderResult, list[str], Path]:
    """A very short run without a root, its lines of progress, and the working directory."""
    lines: list[str] = []
    here = tmp_path_factory.mktemp("here")
    settings = BenchLoaderSettings(
        batch_size=8, size=33, num_batches=2, repeats=2, num_threads=1, out=here / "a/b.json"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(photographs_module, "make_photographs", lambda root: make_photographs(root, num_files=20))
        return bench_loader(settings, report=lines.append), lines, here


@pytest.mark.slow
def test_each_loader_has_a_row_with_every_repeat(measured: tuple[LoaderResult, list[str], Path]) -> None:
    rows = measured[0].rows
    assert [row.name for row in rows] == list(LOADERS) and rows[0].name == "KDDataLoader"
    for row in rows:
        assert len(row.images_per_s) == len(row.cpu_s_per_image) == len(row.peak_memory_bytes) == 2
        assert min(row.images_per_s) > 0 and min(row.peak_memory_bytes) > 2**26


@pytest.mark.slow
def test_more_batch_sizes_have_rows_on_dali(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["KDDataLoader", "bare DALI graph"]
    monkeypatch.setattr(loader, "LOADERS", {name: LOADERS[name] for name in names})
    settings = BenchLoaderSettings(
        root=numbered,
        batch_size=12,
        more_batch_sizes=(12, NUM_FILES, NUM_FILES + 1),
        size=16,
        num_batches=1,
        repeats=1,
        num_threads=1,
    )
    result = bench_loader(settings)
    suffixes = ["", f", batch of {NUM_FILES}"]
    assert [row.name for row in result.rows] == [name + suffix for suffix in suffixes for name in names]
    assert all(own > 0 for row in result.rows for own in row.own_s_per_batch)
    assert [result.ratio_to_first(row) for row in result.rows[::2]] == [1, 1]


@pytest.mark.slow
def test_arrays_are_read_by_the_loaders_on_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader, "_NUM_IMAGES", 8)
    settings = BenchLoaderSettings(
        source="arrays", batch_size=4, more_batch_sizes=(8,), size=16, num_batches=1, repeats=1, num_threads=1
    )
    result = bench_loader(settings)
    names = ["KDDataLoader", "bare DALI graph"]
    assert [row.name for row in result.rows] == [*names, *(f"{name}, batch of 8" for name in names)]
    assert np.load("data/photographs.npy").shape == (8, 256, 256, 3)
    task = DecodeTask(Path("data/photographs.npy"), TRANSFORM, 4, 1, CPU)
    kd, bare = (next(LOADERS[name](task)) for name in names)
    assert kd.shape == bare.shape == (4, 3, SIZE, SIZE) and kd.dtype == bare.dtype


@pytest.mark.slow
def test_result_has_the_settings(measured: tuple[LoaderResult, list[str], Path]) -> None:
    result, _, here = measured
    assert result.settings == {
        "source": "files",
        "root": "data/photographs",
        "batch_size": 8,
        "more_batch_sizes": [256],
        "size": 33,
        "num_batches": 2,
        "repeats": 2,
        "num_threads": 1,
        "device": "cpu",
        "decode": [],
        "decode_auto": {"decode": "window", "hw_decoder_load": 0.0},
        "hw_decoder_loads": [],
        "out": str(here / "a/b.json"),
    }


@pytest.mark.slow
def test_json_file_has_the_result(measured: tuple[LoaderResult, list[str], Path]) -> None:
    result, _, here = measured
    text = (here / "a/b.json").read_text()
    assert text == result.to_json() + "\n"
    assert len(json.loads(text)["rows"]) == 4


@pytest.mark.slow
def test_progress_is_reported(measured: tuple[LoaderResult, list[str], Path]) -> None:
    _, lines, _ = measured
    assert "data/photographs" in lines[0]
    assert lines[1].startswith("20 files")
    assert [line[:13] for line in lines[-2:]] == ["repeat 1 of 2", "repeat 2 of 2"]


@pytest.mark.slow
def test_no_worker_is_left(measured: tuple[LoaderResult, list[str], Path]) -> None:
    assert not [worker for worker in multiprocessing.active_children() if "DataLoader" in worker.name]


def test_loaders_are_closed_after_an_error(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Generator[Tensor, None, None]] = []
    for name, open_stream in LOADERS.items():

        def remember(*arguments: Any, open_stream: Any = open_stream) -> Generator[Tensor, None, None]:
            opened.append(open_stream(*arguments))
            return opened[-1]

        monkeypatch.setitem(LOADERS, name, remember)
    monkeypatch.setattr(loader, "measure", None)
    with pytest.raises(TypeError):
        bench_loader(BenchLoaderSettings(root=photographs))
    assert [inspect.getgeneratorstate(stream) for stream in opened] == [inspect.GEN_CLOSED] * 4


@pytest.mark.parametrize(
    ("asked", "num_threads", "timed"), [(20, 2, 20), (20, 3, 21), (20, 8, 24), (1, 16, 16), (5, 1, 5)]
)
def test_timed_batches_are_full_rounds(
    asked: int, num_threads: int, timed: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}
    monkeypatch.setattr(loader, "measure", lambda candidates, **options: got.update(options) or [])
    bench_loader(BenchLoaderSettings(root=photographs, num_batches=asked, num_threads=num_threads))
    assert got["num_batches"] == timed


@pytest.mark.parametrize(("num_threads", "group"), [(1, 1), (2, 1), (6, 3), (16, 4)])
def test_warm_up_exceeds_prefetched_batches(
    num_threads: int, group: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, Any] = {}
    monkeypatch.setattr(loader, "measure", lambda candidates, **options: got.update(options) or [])
    bench_loader(BenchLoaderSettings(root=photographs, num_threads=num_threads))
    assert got["num_warm_up"] > 2 * num_threads and got["num_warm_up"] >= 4 * group


def test_each_hw_decoder_load_adds_rows(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[DecodeTask] = []

    def remember(task: DecodeTask) -> Generator[Tensor, None, None]:
        tasks.append(task)
        return (tensor for tensor in ())

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(loader, "resolve_device", lambda device: gpu)
    monkeypatch.setattr(loader, "why_no_cuda_decoder", lambda device: "built without nvJPEG")

    def find(decode: str, hw_decoder_load: float | None, *, device_id: int) -> Decoding:
        assert (decode, device_id) == ("auto", 0)
        if hw_decoder_load == 1:
            raise ConfigError("this GPU decodes images in neither mode")
        return Decoding("full", hw_decoder_load) if hw_decoder_load else Decoding("window", 0)

    def trial(mode: str, *, device_id: int, hw_decoder_load: float) -> DecodeTrial:
        return DecodeTrial(decode=mode, hw_decoder_load=0, works=mode == "full", detail="crashed with SIGSEGV")

    monkeypatch.setattr(loader, "resolve_decode", find)
    monkeypatch.setattr(loader, "try_decoding", trial)
    monkeypatch.setattr(loader, "LOADERS", dict.fromkeys(LOADERS, remember))
    monkeypatch.setattr(loader, "measure", lambda candidates, **options: [candidate.name for candidate in candidates])
    lines: list[str] = []
    settings = BenchLoaderSettings(root=photographs, decode=("window", "full"), hw_decoder_loads=(0, 0.75, 1))
    names = list(bench_loader(settings, report=lines.append).rows)
    assert lines[-3] == "no row for torchvision, CUDA decode_jpeg: built without nvJPEG"
    assert lines[-2] == "no rows for decode window: windows: crashed with SIGSEGV"
    assert lines[-1] == "no rows for hw_decoder_load 1: this GPU decodes images in neither mode"
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


def test_cuda_decoder_has_a_row_on_a_gpu_that_has_it(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(loader, "resolve_decode", lambda *args, **more: Decoding("window", 1))
    monkeypatch.setattr(loader, "why_no_cuda_decoder", lambda device: None)
    for offered in ("LOADERS", "GPU_LOADERS"):
        empty = dict.fromkeys(getattr(loader, offered), lambda task: (tensor for tensor in ()))
        monkeypatch.setattr(loader, offered, empty)
    monkeypatch.setattr(loader, "measure", lambda candidates, **options: [candidate.name for candidate in candidates])
    names = list(bench_loader(BenchLoaderSettings(root=photographs)).rows)
    assert names == [*LOADERS, "torchvision, CUDA decode_jpeg"]


def test_reason_for_no_cuda_decoder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **more: object) -> None:
        raise RuntimeError("not compiled with nvJPEG\nException raised from")

    assert why_no_cuda_decoder(CPU) is None
    monkeypatch.setattr("torchvision.io.decode_jpeg", fail)
    assert why_no_cuda_decoder(CPU) == "not compiled with nvJPEG"


@pytest.mark.parametrize(("num_threads", "group"), [(2, 1), (6, 3), (16, 4)])
def test_loaders_on_dali_warm_up_only_their_own_prefetched_batches(
    num_threads: int, group: int, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: dict[str, int | None] = {}
    monkeypatch.setattr(
        loader,
        "measure",
        lambda candidates, **options: got.update({one.name: one.num_warm_up for one in candidates}) or [],
    )
    bench_loader(BenchLoaderSettings(root=photographs, num_threads=num_threads))
    assert list(got.values()) == [4 * group, 4 * group, None, None]


def test_each_decode_mode_adds_rows(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "LOADERS", {name: LOADERS[name] for name in ("KDDataLoader", "bare DALI graph")})
    monkeypatch.setattr(loader, "measure", lambda candidates, **options: [(one.name, one.run(1)) for one in candidates])
    settings = BenchLoaderSettings(root=photographs, batch_size=8, size=16, num_threads=1, decode=("window", "full"))
    assert dict(bench_loader(settings).rows) == {
        "KDDataLoader": 8,
        "bare DALI graph": 8,
        "KDDataLoader, decode window": 8,
        "bare DALI graph, decode window": 8,
        "KDDataLoader, decode full": 8,
        "bare DALI graph, decode full": 8,
    }


def test_hw_decoder_of_a_cpu_is_an_error(photographs: Path) -> None:
    with pytest.raises(ConfigError, match="only a GPU has a hardware decoder"):
        bench_loader(BenchLoaderSettings(root=photographs, device="cpu", hw_decoder_loads=(0.5,)))


def test_non_jpeg_file_is_an_error(photo_folder: Path) -> None:
    with pytest.raises(DataError, match=r"/flower/00\.png: only JPEG files"):
        bench_loader(BenchLoaderSettings(root=photo_folder))


def test_folder_smaller_than_a_batch_is_an_error(photographs: Path) -> None:
    with pytest.raises(DataError, match=r"40 samples .* batch of 64"):
        bench_loader(BenchLoaderSettings(root=photographs))


def test_folder_as_out_is_an_error(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_loader(BenchLoaderSettings(root=photographs, out=tmp_path))


def test_missing_torchvision_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingPackageError, match=r"torchvision .* pip install 'kd_pipeline\[bench\]'"):
        bench_loader(BenchLoaderSettings())
    assert list(tmp_path.iterdir()) == []


ROWS = (
    Measurement("ours", (100, 50, 400), (0.01, 0.02, 0.012), (2**30, 2**29, 2**30 + 3 * 2**20), (0.5, 0.6, 0.9)),
    Measurement("theirs", (50, 20, 100), (0.03, 0.02, 0.04), (2**30, 2**29, 2**30 - 2**20), (0.1, 0.2, 0.7)),
)
RESULT = LoaderResult(ROWS, {"batch_size": 8, "device": "cpu"}, {"num_cores": 2})


def test_ratio_is_the_median_within_repeats() -> None:
    assert RESULT.ratio_to_first(ROWS[1]) == 0.4  # of 0.5, 0.4 and 0.25; the ratio of the medians is 0.5
    assert RESULT.ratio_to_first(ROWS[0]) == 1.0


def test_table_has_medians_extremes_and_ratios() -> None:
    header, ours, theirs, *notes = RESULT.table().splitlines()
    assert len(header) == len(ours) == len(theirs)
    assert ours.split() == ["ours", "100", "50", "400", "1.00", "12.00", "600.00", "3.0"]
    assert theirs.split() == ["theirs", "50", "20", "100", "0.40", "30.00", "200.00", "-1.0"]
    assert "3 interleaved repeats" in notes[0] and "2 core(s), cpu." in notes[0]


def test_json_has_every_repeat() -> None:
    found = json.loads(RESULT.to_json())
    assert found["settings"] == {"batch_size": 8, "device": "cpu"} and found["environment"] == {"num_cores": 2}
    assert found["rows"][1] == {
        "name": "theirs",
        "images_per_s": {"median": 50, "min": 20, "max": 100, "repeats": [50, 20, 100]},
        "ratio_to_first": 0.4,
        "cpu_s_per_image": {"median": 0.03, "min": 0.02, "max": 0.04, "repeats": [0.03, 0.02, 0.04]},
        "peak_memory_bytes": {
            "median": 2**30 - 2**20,
            "min": 2**29,
            "max": 2**30,
            "repeats": [2**30, 2**29, 2**30 - 2**20],
        },
        "memory_growth_bytes": -(2**20),
        "own_s_per_batch": {"median": 0.2, "min": 0.1, "max": 0.7, "repeats": [0.1, 0.2, 0.7]},
    }


# As a command


@pytest.mark.parametrize("typed", [["--repeats", "0"], ["--hw-decoder-load", "2"]])
def test_command_names_the_wrong_option(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed) == 1
    assert capsys.readouterr().err.startswith(f"python -m benchmarks.loader: {typed[0]}: ")


@pytest.mark.slow
def test_command_prints_the_table(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the loaders on DALI, which start no processes; a run of all is above."""
    names = ["KDDataLoader", "bare DALI graph"]
    monkeypatch.setattr(loader, "LOADERS", {name: LOADERS[name] for name in names})
    out = tmp_path / "loader.json"
    short = ["--batch-size", "4", "--size", "16", "--num-batches", "1", "--repeats", "1", "--num-threads", "1"]
    assert main(["--root", str(photographs), "--device", "cpu", "--out", str(out), *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("KDDataLoader  ") and lines[-1] == f"all repeats: {out}"
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == names
