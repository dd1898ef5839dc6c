import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import scale, scale_data, scale_worker
from benchmarks.scale import BenchScaleSettings, RanksRow, ScaleResult, ScaleRow, bench_scale, main
from benchmarks.scale_data import SHARD_SAMPLES, link_folder, link_shards, write_images
from benchmarks.scale_worker import DataTask, StartSample
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import FileList, ImageFolder
from kd_pipeline.data.sources.tar.source import Tar
from kd_pipeline.errors import ConfigError, DataError
from tests.forks import fork_context

NUM_SHORT, NUM_LONG = 1_000, 50_000
"""Entries of a list below a megabyte, and of one above it."""


@pytest.fixture(scope="module", autouse=True)
def workers_are_forks() -> Iterator[None]:
    """Each start is a process, and a new one imports for seconds."""
    fork_context()  # before the environment is that of a test
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_worker, "spawn_context", fork_context)
        yield


@pytest.fixture(scope="module")
def measured(
    photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ScaleResult, list[str], Path, list[str]]:
    """A short run, its lines of progress, its JSON file, and the names of all files that it left."""
    lines: list[str] = []
    here = tmp_path_factory.mktemp("here")
    (here / "tmp").mkdir()
    settings = BenchScaleSettings(
        root=photographs,
        sizes=(NUM_SHORT, NUM_LONG),
        folders=(30,),
        shards=(2 * SHARD_SAMPLES,),
        ranks=(2,),
        ranks_size=NUM_SHORT,
        batch_size=16,
        num_batches=3,
        repeats=1,
        num_threads=2,
        out=here / "a/b.json",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "_SETTLE_S", 0.0)
        patch.setattr(scale.tempfile, "tempdir", str(here / "tmp"))
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        result = bench_scale(settings, report=lines.append)
    return result, lines, here / "a/b.json", os.listdir(here / "tmp") + os.listdir(here)


@pytest.mark.slow
def test_each_size_has_a_first_and_later_starts(measured: tuple[ScaleResult, Any, Any, Any]) -> None:
    rows = measured[0].sizes
    counts = [("list", NUM_SHORT), ("list", NUM_LONG), ("folder", 30), ("shards", 2 * SHARD_SAMPLES)]
    assert [(row.kind, row.num_samples) for row in rows] == counts
    for row in rows:
        assert len(row.again) == 1
        for start in (row.first, *row.again):
            assert min(start.open_s, start.first_batch_s, start.fingerprint_s, *start.resume_s, start.plan_s) > 0
            assert len(start.resume_s) == 2
            assert 2**27 < start.peak_memory_bytes < 2**32
            assert 300 < start.state_bytes < 3000


@pytest.mark.slow
def test_list_above_a_megabyte_has_an_index(measured: tuple[ScaleResult, Any, Any, Any]) -> None:
    short, long, folder, shards = measured[0].sizes
    assert folder.index_bytes == folder.list_bytes == shards.list_bytes == 0 < shards.index_bytes
    assert short.index_bytes == 0 and short.list_bytes < 2**20
    assert long.list_bytes > 2**20
    assert long.index_bytes > NUM_LONG * 8 * 2


@pytest.mark.slow
def test_each_rank_has_a_rate_in_every_repeat(measured: tuple[ScaleResult, Any, Any, Any]) -> None:
    (row,) = measured[0].ranks
    assert (row.num_ranks, row.num_threads) == (2, 1)
    assert len(row.images_per_s) == 1 and len(row.images_per_s[0]) == len(row.peak_memory_bytes) == 2
    assert row.total == (sum(row.images_per_s[0]),) and min(row.images_per_s[0]) > 0


@pytest.mark.slow
def test_no_files_are_left(
    measured: tuple[Any, Any, Any, list[str]],
) -> None:
    assert sorted(measured[3]) == ["a", "tmp"]


@pytest.mark.slow
def test_json_file_has_the_result(measured: tuple[ScaleResult, Any, Path, Any]) -> None:
    result, lines, out, _ = measured
    assert [line[:30] for line in lines[:2]] == [f"list of 1,000, process {number} of 2:"[:30] for number in (1, 2)]
    assert lines[-1].startswith("2 rank(s), images/s: ")
    assert out.read_text() == result.to_json() + "\n"
    read = json.loads(out.read_text())
    assert read["sizes"][1]["again"]["open_s"]["repeats"] == [result.sizes[1].again[0].open_s]
    assert read["sizes"][1]["again"]["resume_at_90%_s"]["median"] == result.sizes[1].again[0].resume_s[1]
    assert read["sizes"][0]["first"]["peak_memory_bytes"] == result.sizes[0].first.peak_memory_bytes
    assert read["ranks"][0]["total_images_per_s"]["median"] == result.ranks[0].total[0]
    assert read["settings"]["batch_size"] == 16 and read["environment"]["num_cores"]


def test_table_has_medians_of_the_later_starts() -> None:
    def start(open_s: float, mib: int) -> StartSample:
        return StartSample(open_s, 1.0, 0.5, (0.25, 0.75), 840, mib * 2**20, 2.0, 0.0004)

    row = ScaleRow("list", 10**7, 1, 1, start(30.0, 9000), (start(1.0, 700), start(3.0, 1200), start(2.0, 800)))
    ranks = RanksRow(2, 1, ((100.0, 50.0), (110.0, 80.0), (300.0, 60.0)), (2**29, 2**30))
    table = ScaleResult((row,), (ranks,), {}, {"num_cores": 2}).table().splitlines()
    assert " ".join(table[1].split()) == "list 10,000,000 30.00 2.00 1.00 3.00 0.50 0.25 0.75 2.00 0.400 840 1,200"
    assert " ".join(table[4].split()) == "2 1 190 150 360 60 1,024"
    assert len(table[0]) == len(table[1]) and len(table[3]) == len(table[4])
    assert table[5].startswith("Medians of 3 processes or repeats on 2 core(s)")


def test_list_cycles_through_all_images(photographs: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "photographs", photographs)
    task = scale._prepare(tmp_path, "list", images, 617, batch_size=7, num_threads=3)
    source = FileList(task.path)
    assert len(source) == 617 and source.num_classes == 10
    names = [source.name(index) for index in range(617)]
    assert len(set(names)) == 250 and names[:250] == names[250:500] and names[:117] == names[500:]
    assert all(Path(name).stat().st_size < 4000 for name in set(names))
    assert (task.batch_size, task.num_threads) == (7, 3)


def test_folder_has_links_in_classes(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_data, "_FOLDER_FILES", 100)
    images = write_images(tmp_path / "photographs", photographs)
    link_folder(tmp_path / "folder", images, 617)
    source = ImageFolder(tmp_path / "folder")
    assert len(source) == 617 and source.num_classes == 7
    assert len({os.stat(source.name(index)).st_ino for index in range(617)}) == 250


def test_shards_are_links_to_one(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_data, "SHARD_SAMPLES", 300)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = write_images(tmp_path / "photographs", photographs)
    source = Tar(link_shards(tmp_path / "shards", images, 900))
    assert source.shard_ends.tolist() == [0, 300, 600, 900] and source.num_classes == 10
    assert [bytes(image) for image in source.read(np.array([3, 553]))] == [images[3].read_bytes()] * 2
    with pytest.raises(ConfigError, match="shards: 1000 samples do not fill shards of 300; give a multiple"):
        link_shards(tmp_path / "more", images, 1000)


def test_resume_continues_with_the_right_batch(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "photographs", photographs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = scale._prepare(tmp_path, "list", images, 500, batch_size=10, num_threads=1).path
    task = DataTask(path, tmp_path / "cache", 10, 1)
    source = task.open_source()
    with task.open_loader(source) as loader:
        order = [batch.index.tolist() for batch in loader]
        state = loader.state_dict()
        for share, number in ((0.01, 0), (0.9, 45)):
            scale_worker._resume(loader, {**state, "epoch": 0}, share)
            assert loader.state_dict()["epoch"] == 0 and loader.state_dict()["batch"] == number
            assert next(iter(loader)).index.tolist() == order[number]
        assert len(order) == 50


def test_small_disk_is_an_error_before_measuring(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    monkeypatch.setattr(scale, "start_in_process", None)
    words = r"sizes: a list of 0\.4 GB and its index need 0\.9 GB in .* and 0\.1 GB are free; omit the largest"
    with pytest.raises(ConfigError, match=words):
        bench_scale(BenchScaleSettings(root=photographs, sizes=(10, 10**7), ranks=()))


@pytest.mark.slow
def test_killed_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = DataTask(tmp_path / "1000.csv", tmp_path, 8, 1)
    monkeypatch.setattr(scale_worker, "_start", _killed)
    with pytest.raises(DataError, match=r"opened 1000\.csv was killed, usually for lack of memory"):
        scale_worker.start_in_process(task, 0)


def _killed(task: DataTask, number: int) -> None:
    os._exit(9)


@pytest.mark.slow
def test_failing_rank_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("a,b,c\n")
    with pytest.raises((DataError, RuntimeError)):
        scale_worker.run_ranks(DataTask(tmp_path / "none.csv", tmp_path, 8, 1), 2, num_batches=1, repeats=1)


def test_planning_covers_the_epoch(tmp_path: Path) -> None:
    class Source:
        stores = "files"

        def __init__(self) -> None:
            self.seen: list[int] = []

        def __len__(self) -> int:
            return 1000

        def read(self, index: Any) -> None:
            self.seen += index.tolist()

    source = Source()
    order_s, plan_s = scale_worker._plan(source, DataTask(tmp_path, tmp_path, 10, 1))  # type: ignore[arg-type]
    assert order_s > 0 and plan_s > 0
    assert len(source.seen) == 2000 and len(np.unique(source.seen)) > 700


def test_folder_as_out_is_an_error(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_scale(BenchScaleSettings(root=photographs, out=tmp_path))


def test_broken_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("none")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/bad.jpg: Pillow cannot read it")):
        bench_scale(BenchScaleSettings(root=tmp_path, sizes=(10,)))


def test_ranks_load_shards_of_one_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Loader:
        def __enter__(self) -> "Loader":
            return self

        def __exit__(self, *failure: object) -> None: ...

        def __iter__(self) -> Any:
            return iter([[0] * 4] * 3)

    class Gate:
        def wait(self, timeout: float) -> None: ...

    seen: list[Any] = []
    monkeypatch.setattr(DataTask, "open_source", lambda task: "the list")
    monkeypatch.setattr(
        DataTask, "open_loader", lambda task, source, shard: [seen.append((source, shard)), Loader()][1]
    )
    monkeypatch.setattr(scale_worker, "_barrier", Gate(), raising=False)
    rates, _ = scale_worker._run_rank(DataTask(tmp_path, tmp_path, 4, 1), Shard(1, 2), 5, 3)
    assert seen == [("the list", Shard(1, 2))] and len(rates) == 3


@pytest.mark.slow
def test_command_runs_with_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    got: list[BenchScaleSettings] = []
    result = ScaleResult((), (), {}, {})
    monkeypatch.setattr(ScaleResult, "table", lambda self: "the table")
    monkeypatch.setattr(scale, "bench_scale", lambda settings, report: [got.append(settings), result][1])
    assert main(["--sizes", "10", "20", "--ranks", "--shards", "--num-threads", "3"]) == 0
    assert got == [
        BenchScaleSettings(sizes=(10, 20), ranks=(), shards=(), num_threads=3, out=Path("runs/bench_scale.json"))
    ]
    assert capsys.readouterr().out == "the table\nall repeats: runs/bench_scale.json\n"
    assert main(["--sizes", "0"]) == 1 and "benchmarks.scale: --sizes: " in capsys.readouterr().err
