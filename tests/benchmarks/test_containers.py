import json
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import containers
from benchmarks.container_files import WRITERS, Images, read_images, write_parquet, write_tar
from benchmarks.container_rows import ROWS, ContainerTask, Row
from benchmarks.containers import BenchContainersSettings, ContainersResult, bench_containers
from benchmarks.file_server import FileServer, serving
from kd_pipeline.bench.measure import Measurement
from kd_pipeline.data.transforms import TrainTransform

NUM_SHARDS, NUM_LINKS = 3, 2
OURS = tuple(row.name for row in ROWS if row.package is None)
NAMES = [f"{number:05}" for number in range(NUM_SHARDS * NUM_LINKS)]


@pytest.fixture(scope="module")
def images(photographs: Path) -> Images:
    return read_images(photographs, num_shards=NUM_SHARDS, num_links=NUM_LINKS)


def write(container: str, images: Images, folder: Path) -> Path:
    (folder / container).mkdir()
    WRITERS[container](images, folder / container)
    return folder / container


def test_tar_shards_have_every_image_and_links_again(images: Images, tmp_path: Path) -> None:
    write_tar(images, tmp_path)
    content, labels = [], []
    for name in NAMES:
        with tarfile.open(tmp_path / f"{name}.tar") as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                if member.name.endswith(".jpg"):
                    content.append(file.read())
                else:
                    labels.append(int(file.read()))
    assert (content, labels) == (list(images.content) * 2, list(images.labels) * 2)
    assert [(tmp_path / f"{name}.tar").is_symlink() for name in NAMES] == [False] * NUM_SHARDS + [True] * NUM_SHARDS


def test_parquet_files_have_every_image_and_links_again(images: Images, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(images, tmp_path)
    rows = [row for name in NAMES for row in parquet.read_table(tmp_path / f"{name}.parquet").to_pylist()]
    assert [row["image"]["bytes"] for row in rows] == list(images.content) * 2
    assert [row["label"] for row in rows] == list(images.labels) * 2


@pytest.mark.parametrize("container", ["mds", "litdata"])
def test_links_are_in_the_index(container: str, images: Images, tmp_path: Path) -> None:
    pytest.importorskip("streaming" if container == "mds" else container)
    folder = write(container, images, tmp_path)
    index = json.loads((folder / "index.json").read_text())
    shards = index["shards" if container == "mds" else "chunks"]
    samples = [shard["samples" if container == "mds" else "chunk_size"] for shard in shards]
    assert sum(samples) == NUM_LINKS * len(images.content)
    names = {shard["raw_data"]["basename"] if container == "mds" else shard["filename"] for shard in shards}
    assert names == {path.name for path in folder.iterdir()} - {"index.json"} and len(names) == len(shards)


def measurement(name: str, images_per_s: tuple[float, ...]) -> Measurement:
    repeats = len(images_per_s)
    return Measurement(name, images_per_s, (0.002,) * repeats, (2**27,) * repeats, (0.001,) * repeats)


def result(*rows: Measurement) -> ContainersResult:
    names = [row.name for row in rows]
    settings, environment = {"latency_ms": 20.0}, {"num_cores": 2}
    return ContainersResult(
        rows, dict.fromkeys(names, "global"), dict.fromkeys(names, 0.0001), {"MDS": "missing"}, settings, environment
    )


def test_ratios_are_to_the_files_in_the_same_repeat() -> None:
    files, tar = measurement("files", (100, 50, 200)), measurement("tar", (98, 50, 190))
    line = result(files, tar).table().splitlines()[2]
    assert line.split()[:5] == ["tar", "98", "0.980", "0.950", "1.000"]
    (_, row) = json.loads(result(files, tar).to_json())["rows"]
    assert row["times_files"] == {"median": 0.98, "min": 0.95, "max": 1.0, "repeats": [0.98, 1.0, 0.95]}


def test_rows_that_were_left_out_are_in_the_table() -> None:
    assert "no row MDS: missing" in result(measurement("files", (1, 2))).table()


@pytest.fixture
def names_measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be measured; nothing is."""
    names: list[str] = []

    def measure(settings: object, rows: Any, *others: object) -> tuple[list[Measurement], dict[str, float]]:
        names.extend(row.name for row in rows)
        return [], {}

    monkeypatch.setattr(containers, "_measure", measure)
    monkeypatch.setattr(containers, "serving", lambda folder, latency_s: nullcontext(FileServer("", 0)))
    monkeypatch.setattr(containers, "WRITERS", dict.fromkeys(WRITERS, lambda images, folder: None))
    return names


def test_packages_that_are_missing_leave_rows_out(
    photographs: Path, names_measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "find_spec", lambda name: None)
    lines: list[str] = []
    left_out = bench_containers(BenchContainersSettings(root=photographs), report=lines.append).left_out
    assert tuple(names_measured) == OURS
    assert set(left_out) == {row.name for row in ROWS} - set(OURS)
    assert "no row tar: webdataset: webdataset is not installed" in lines


def test_chosen_rows_come_after_the_files(photographs: Path, names_measured: list[str]) -> None:
    bench_containers(BenchContainersSettings(root=photographs, rows=("tar over HTTP", "tar")))
    assert names_measured == ["files", "tar", "tar over HTTP"]


def test_unknown_rows_are_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert containers.main(["--rows", "tar by shrads"]) != 0
    assert "there is no row 'tar by shrads'; did you mean 'tar by shards'" in capsys.readouterr().err


@pytest.mark.slow
def test_each_container_is_measured(photographs: Path, tmp_path: Path) -> None:
    chosen = tuple(name for name in OURS if "torchvision" not in name)
    settings = BenchContainersSettings(
        root=photographs,
        rows=chosen,
        batch_size=8,
        size=16,
        num_batches=1,
        repeats=1,
        num_threads=1,
        num_shards=NUM_SHARDS,
        num_links=NUM_LINKS,
        latency_ms=1,
        out=tmp_path / "result.json",
    )
    result = bench_containers(settings)
    assert tuple(row.name for row in result.rows) == chosen
    assert all(row.images_per_s[0] > 0 for row in result.rows)
    assert json.loads((tmp_path / "result.json").read_text())["rows"][1]["order"] == "global"


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.package], ids=lambda row: row.name)
def test_other_loaders_give_full_batches(row: Row, images: Images, photographs: Path, tmp_path: Path) -> None:
    assert row.package is not None and row.container is not None
    pytest.importorskip(row.package)
    write(row.container, images, tmp_path)
    with serving(tmp_path, latency_s=0.001) as server:
        transform = TrainTransform(size=16)
        task = ContainerTask(
            photographs, transform, 8, 1, torch.device("cpu"), images, tmp_path, server.url, tmp_path / "cache"
        )
        stream = row.open_stream(task)
        assert [next(stream).shape for _ in range(12)] == [(8, 3, 16, 16)] * 12, "more than an epoch"
        stream.close()
