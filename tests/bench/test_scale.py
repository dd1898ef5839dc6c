import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kd_pipeline.bench import BenchScaleSettings, bench_scale, starts
from kd_pipeline.bench import scale as room
from kd_pipeline.bench.scale import RanksRow, ScaleResult, ScaleRow
from kd_pipeline.bench.starts import Case, Start
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources.base import FileList
from kd_pipeline.errors import ConfigError, DataError

NUM_SHORT, NUM_LONG = 1_000, 50_000
"""Entries of a list below a megabyte, and of one above."""


@pytest.fixture(scope="module")
def measured(
    photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ScaleResult, list[str], Path, list[str]]:
    """A short run with its lines of progress, its JSON file, and what was left in the temporary folder."""
    lines: list[str] = []
    here = tmp_path_factory.mktemp("here")
    (here / "tmp").mkdir()
    settings = BenchScaleSettings(
        root=photographs,
        sizes=(NUM_SHORT, NUM_LONG),
        ranks=(2,),
        ranks_size=NUM_SHORT,
        batch_size=16,
        num_batches=3,
        repeats=1,
        num_threads=2,
        out=here / "a/b.json",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room.tempfile, "tempdir", str(here / "tmp"))
        patch.setenv("XDG_CACHE_HOME", str(here / "cache"))
        result = bench_scale(settings, report=lines.append)
    return result, lines, here / "a/b.json", os.listdir(here / "tmp") + os.listdir(here)


def test_every_size_has_a_first_start_and_one_for_each_repeat(measured: tuple[ScaleResult, Any, Any, Any]) -> None:
    rows = measured[0].sizes
    assert [row.num_entries for row in rows] == [NUM_SHORT, NUM_LONG]
    for row in rows:
        assert len(row.again) == 1
        for start in (row.first, *row.again):
            assert min(start.open_s, start.first_batch_s, start.fingerprint_s, *start.resume_s, start.plan_s) > 0
            assert len(start.resume_s) == 2
            assert 2**27 < start.peak_memory_bytes < 2**32
            assert 300 < start.state_bytes < 3000


def test_a_list_of_a_megabyte_is_kept_as_an_index(measured: tuple[ScaleResult, Any, Any, Any]) -> None:
    short, long = measured[0].sizes
    assert short.index_bytes == 0 and short.list_bytes < 2**20
    assert long.list_bytes > 2**20
    assert long.index_bytes > NUM_LONG * 8 * 2


def test_every_rank_has_a_rate_in_every_repeat(measured: tuple[ScaleResult, Any, Any, Any]) -> None:
    (row,) = measured[0].ranks
    assert (row.num_ranks, row.num_threads) == (2, 1)
    assert len(row.images_per_s) == 1 and len(row.images_per_s[0]) == len(row.peak_memory_bytes) == 2
    assert row.total == (sum(row.images_per_s[0]),) and min(row.images_per_s[0]) > 0


def test_lists_and_indexes_are_gone_and_the_user_s_cache_is_untouched(
    measured: tuple[Any, Any, Any, list[str]],
) -> None:
    assert sorted(measured[3]) == ["a", "tmp"]


def test_progress_is_reported_and_the_json_file_holds_everything(measured: tuple[ScaleResult, Any, Path, Any]) -> None:
    result, lines, out, _ = measured
    assert [line[:30] for line in lines[:2]] == [f"1,000 entries, process {number} of 2:"[:30] for number in (1, 2)]
    assert lines[-1].startswith("2 rank(s), images/s: ")
    assert out.read_text() == result.to_json() + "\n"
    read = json.loads(out.read_text())
    assert read["sizes"][1]["again"]["open_s"]["repeats"] == [result.sizes[1].again[0].open_s]
    assert read["sizes"][1]["again"]["resume_at_90%_s"]["median"] == result.sizes[1].again[0].resume_s[1]
    assert read["sizes"][0]["first"]["peak_memory_bytes"] == result.sizes[0].first.peak_memory_bytes
    assert read["ranks"][0]["total_images_per_s"]["median"] == result.ranks[0].total[0]
    assert read["settings"]["batch_size"] == 16 and read["environment"]["num_cores"]


def test_the_table_shows_medians_over_the_later_processes() -> None:
    def start(open_s: float, mib: int) -> Start:
        return Start(open_s, 1.0, 0.5, (0.25, 0.75), 840, mib * 2**20, 2.0, 0.0004)

    row = ScaleRow(10**7, 1, 1, start(30.0, 9000), (start(1.0, 700), start(3.0, 1200), start(2.0, 800)))
    ranks = RanksRow(2, 1, ((100.0, 50.0), (110.0, 80.0), (300.0, 60.0)), (2**29, 2**30))
    table = ScaleResult((row,), (ranks,), {}, {"num_cores": 2}).table().splitlines()
    assert " ".join(table[1].split()) == "10,000,000 30.00 2.00 1.00 3.00 0.50 0.25 0.75 2.00 0.400 840 1,200"
    assert " ".join(table[4].split()) == "2 1 190 150 360 60 1,024"
    assert len(table[0]) == len(table[1]) and len(table[3]) == len(table[4])
    assert table[5].startswith("Medians of 3 processes or repeats on 2 core(s)")


def test_a_list_refers_to_every_small_image_in_turn(photographs: Path, tmp_path: Path) -> None:
    block = room._write_images(tmp_path / "photographs", photographs)
    case = room._write_list(tmp_path, block, 617, BenchScaleSettings(batch_size=7), 3)
    source = FileList(case.path)
    assert len(source) == 617 and source.num_classes == 10
    names = [source.name(index) for index in range(617)]
    assert len(set(names)) == 250 and names[:250] == names[250:500] and names[:117] == names[500:]
    assert all(Path(name).stat().st_size < 4000 for name in set(names))
    assert (case.batch_size, case.num_threads) == (7, 3)


def test_resuming_is_timed_up_to_the_batch_behind_that_part_of_the_epoch(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = room._write_images(tmp_path / "photographs", photographs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    case = Case(room._write_list(tmp_path, block, 500, BenchScaleSettings(), 1).path, tmp_path / "cache", 10, 1)
    source = case.open_list()
    with case.open_loader(source) as loader:
        order = [batch.index.tolist() for batch in loader]
        state = loader.state_dict()
        for share, number in ((0.01, 0), (0.9, 45)):
            starts._resume(loader, {**state, "epoch": 0}, share)
            assert loader.state_dict()["epoch"] == 0 and loader.state_dict()["batch"] == number + 1
            assert next(iter(loader)).index is not None
        assert len(order) == 50


def test_a_disk_that_is_too_small_is_refused_before_anything_is_measured(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    monkeypatch.setattr(room, "in_process", None)
    words = r"sizes: a list of 0\.4 GB and its index need 0\.9 GB in .* and 0\.1 GB are free; leave out the largest"
    with pytest.raises(ConfigError, match=words):
        bench_scale(BenchScaleSettings(root=photographs, sizes=(10, 10**7), ranks=()))


def test_a_process_that_is_ended_from_outside_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path / "1000.csv", tmp_path, 8, 1)
    monkeypatch.setattr(starts, "_start", _killed)
    with pytest.raises(DataError, match=r"opened 1000\.csv was ended from outside; mostly that is for want of memory"):
        starts.in_process(case, 0)


def _killed(case: Case, number: int) -> None:
    os._exit(9)


def test_a_rank_that_fails_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("a,b,c\n")
    with pytest.raises((DataError, RuntimeError)):
        starts.run_ranks(Case(tmp_path / "none.csv", tmp_path, 8, 1), 2, num_batches=1, repeats=1)


def test_planning_reads_paths_of_batches_all_over_the_epoch(tmp_path: Path) -> None:
    class Source:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def __len__(self) -> int:
            return 1000

        def read(self, index: Any) -> None:
            self.seen += index.tolist()

    source = Source()
    order_s, plan_s = starts._plan(source, 10)  # type: ignore[arg-type]
    assert order_s > 0 and plan_s > 0
    assert len(source.seen) == 2000 and len(np.unique(source.seen)) > 700


def test_a_folder_as_the_result_file_is_refused(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_scale(BenchScaleSettings(root=photographs, out=tmp_path))


def test_a_broken_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("none")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/bad.jpg: Pillow cannot read it")):
        bench_scale(BenchScaleSettings(root=tmp_path, sizes=(10,)))


def test_shards_of_ranks_are_those_of_one_epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Loader:
        def __enter__(self) -> "Loader":
            return self

        def __exit__(self, *failure: object) -> None: ...

        def __iter__(self) -> Any:
            return iter([[0] * 4] * 3)

    class Gate:
        def wait(self, timeout: float) -> None: ...

    seen: list[Any] = []
    monkeypatch.setattr(Case, "open_list", lambda case: "the list")
    monkeypatch.setattr(Case, "open_loader", lambda case, source, shard: [seen.append((source, shard)), Loader()][1])
    monkeypatch.setattr(starts, "_barrier", Gate(), raising=False)
    rates, _ = starts._run_rank(Case(tmp_path, tmp_path, 4, 1), Shard(1, 2), 5, 3)
    assert seen == [("the list", Shard(1, 2))] and len(rates) == 3
