import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import views
from benchmarks.views import BenchViewsSettings, ViewsResult, bench_views, main
from kd_pipeline.bench.measure import Measurement
from kd_pipeline.errors import ConfigError, DataError

SHORT = {
    "batch_size": 8,
    "size": 16,
    "large_size": 24,
    "local_size": 8,
    "num_locals": 2,
    "num_batches": 1,
    "repeats": 2,
    "num_threads": 1,
}
NAMES = [
    "one view",
    "bare DALI graph",
    "16 and 24 of one window",
    "two loaders",
    "16 and 2 crops of 8",
    "3 loaders",
]


@pytest.mark.slow
def test_each_row_is_measured_beside_the_other(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = bench_views(BenchViewsSettings(root=photographs, ops=("crop", "colors"), **SHORT, out=out))
    colors = [f"{name}, colors" for name in NAMES if name != "bare DALI graph"]
    assert [row.name for row in result.rows] == [*NAMES, *colors]
    assert all(min(row.images_per_s) > 0 and min(row.cpu_s_per_image) > 0 for row in result.rows)
    assert {result.against[name] for name in colors} == {f"{name}, colors" for name in ("one view", *NAMES[3::2])}
    found = json.loads(out.read_text())
    assert found["rows"][2]["against"] == "two loaders" and len(found["rows"][2]["time"]["repeats"]) == 2
    assert found["settings"]["num_threads"] == 1


@pytest.fixture
def batches(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Samples in each of the first three batches of each row, and how many are timed and how many not."""
    found: dict[str, list[int]] = {}

    def measure(candidates: Any, **options: Any) -> list[Measurement]:
        found["options"] = [options["num_batches"], options["num_warm_up"]]
        found.update({each.name: [each.run(1) for _ in range(3)] for each in candidates})
        return [measurement(each.name, (1.0,)) for each in candidates]

    monkeypatch.setattr(views, "measure", measure)
    bench_views(BenchViewsSettings(root=photographs, **{**SHORT, "batch_size": 24}))
    return found


@pytest.mark.slow
def test_batches_are_full_beyond_an_epoch(batches: dict[str, list[int]]) -> None:
    assert {name: batches[name] for name in NAMES} == dict.fromkeys(NAMES, [24] * 3)


@pytest.mark.slow
def test_whole_groups_are_timed_after_what_was_prefetched(batches: dict[str, list[int]]) -> None:
    num_batches, num_warm_up = batches["options"]
    assert num_batches >= 1 and num_warm_up == 4 * num_batches


def measurement(name: str, images_per_s: tuple[float, ...]) -> Measurement:
    repeats = len(images_per_s)
    return Measurement(
        name, images_per_s, tuple(2 / each for each in images_per_s), (2**27,) * repeats, (0.1,) * repeats
    )


def test_time_is_that_of_the_same_repeat() -> None:
    rows = measurement("views", (150, 80, 100)), measurement("loaders", (75, 60, 80))
    result = ViewsResult(rows, dict.fromkeys(("views", "loaders"), "loaders"), {"device": "cpu"}, {"num_cores": 2})
    line = result.table().splitlines()[1]
    assert line.split() == ["views", "100", "0.750", "0.500", "0.800", "0.750", "20.00", "100.00", "loaders"]
    (row, _) = json.loads(result.to_json())["rows"]
    assert row["time"] == {"median": 0.75, "min": 0.5, "max": 0.8, "repeats": [0.5, 0.75, 0.8]}
    assert row["cpu_time"] == 0.75


def test_too_few_files_are_an_error(photographs: Path) -> None:
    with pytest.raises(DataError, match=r"40 samples .* batch of 64"):
        bench_views(BenchViewsSettings(root=photographs))


def test_folder_as_out_is_an_error(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; give the name of a JSON file"):
        bench_views(BenchViewsSettings(root=photographs, out=tmp_path))


def test_command_names_the_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-locals", "0"]) == 1
    assert capsys.readouterr().err.startswith("python -m benchmarks.views: --num-locals: ")


@pytest.mark.slow
def test_command_prints_the_table(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "views.json"
    short = [text for name, value in SHORT.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["--root", str(photographs), "--out", str(out), *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("one view  ") and lines[-1] == f"all repeats: {out}"
    assert len(json.loads(out.read_text())["rows"]) == len(NAMES)
