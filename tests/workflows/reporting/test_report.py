"""The report on runs: complete, one file, of whatever is in a run's folder, and readable in a browser."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from kd_pipeline.cli import main
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows.reporting.head import status_of
from kd_pipeline.workflows.reporting.report import write_report
from kd_pipeline.workflows.reporting.run import find_runs, read_run
from tests.browser import CHROMIUM, open_browser
from tests.hostile.cases import DEEP, SPECIAL, remove
from tests.training import networks, tiny_run

EVIL = "<script>alert(1)</script>"
CLASSES = [EVIL, "\"'><img src=x onerror=alert(1)>", *map(str, range(2, 10))]
PLUGINS = [networks.__name__]


def config(digits: Path, name: str, **changes: Any) -> Config:
    return tiny_run.settings(
        digits,
        name,
        data__train__source={"kind": "arrays", "images": digits / "train.npz", "classes": CLASSES},
        **changes,
    )


@pytest.fixture(scope="module")
def runs(digits: Path) -> tuple[Path, Path]:
    """A run, and in its folder that of its baseline."""
    tiny_run.train_without_plots(config(digits, "run"))
    tiny_run.train_without_plots(config(digits, "run", stage="baseline"))
    return digits / "run", digits / "run" / "baseline"


def write(*folders: Path, out: Path, **options: Any) -> str:
    file = write_report(folders, out, plugins=PLUGINS, report=lambda line: None, **options)
    return file.read_text(encoding="utf-8")


@pytest.fixture
def copy(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A run's folder to change."""
    return Path(shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


def test_it_has_every_part(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = write(runs[0], out=tmp_path / "a.html")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        *("Contents", "Results", "Curves", "Classes", "Samples", "First training batch", "Time and cost"),
        *("Checks and files", "History", "Config", "Environment"),
    ]
    assert "Finished" in page and "points" in page and "The same student without a teacher reaches" in page
    assert (
        "only the teacher right" in page and "Worst of the student" in page and "answered for this report" not in page
    )
    assert page.count('class="tiny"') > 20 and "Confusion matrix" in page
    assert "of the time of a step goes into" in page and "Energy is that of the training" in page
    assert "log_every_steps: 1" in page and "exported/model.safetensors" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert len(page) < 500_000


def test_several_are_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = write(*runs, out=tmp_path / "a.html", samples=False)
    assert "Comparison of runs" in page and "2 runs side by side: run, baseline" in page
    differences = page[page.index("<h2>Differences</h2>") : page.index("<h2>Curves</h2>")]
    assert all(text in differences for text in ("<td>stage</td>", "<td>distill</td>", "<td>baseline</td>", "val/top1"))
    assert "Data: no difference" in differences and "Versions: no difference" in differences
    assert "Pictures were left out" in page or "samples were left out" in page


def tiles(page: str) -> set[str]:
    return {*re.findall(r"<li>\s*(<img.*?)</li>", page, re.DOTALL)}


def test_a_run_without_answers_is_asked_again(runs: tuple[Path, Path], copy: Path, tmp_path: Path) -> None:
    (copy / "predictions_val.csv").unlink()
    asked, kept = (write(folder, out=tmp_path / "a.html") for folder in (copy, runs[0]))
    assert "the student and the teacher answered for this report" in asked
    assert tiles(asked) == tiles(kept) and len(tiles(kept)) > 20


@pytest.mark.parametrize("error", [IndexError("Target 12 is out of bounds."), RuntimeError("no such kernel")])
def test_a_student_that_fails_ends_no_report(
    error: Exception, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "predictions_val.csv").unlink()
    monkeypatch.setattr("kd_pipeline.workflows.reporting.samples.run_on_view", Mock(side_effect=error))
    page = write(copy, out=tmp_path / "a.html")
    assert f"The answers to single images are not known: {str(error).rstrip('.')}." in page


def write_predictions(run: Path, **changes: str) -> None:
    row = {"index": "3", "path": "", "label": "7", "student": "2", "student_probability": "0.75"}
    row |= {"teacher": "7", "teacher_probability": "0.5", "loss": "1.5"} | changes
    text = f"{','.join(row)}\n{','.join(row.values())}\n"
    (run / "predictions_val.csv").write_text(text, encoding="utf-8")


def test_answers_of_the_run_are_taken_as_they_are(copy: Path, tmp_path: Path) -> None:
    write_predictions(copy)
    page = write(copy, out=tmp_path / "a.html")
    assert "answered for this report" not in page
    assert re.search(r"<span>student</span> 2 \(75%\)", page) and re.search(r"<span>teacher</span> 7 \(50%\)", page)
    assert page.count('class="tiny"') == 1 and "Of 40 images 1 are known one by one" in page
    assert "only the teacher right" not in page  # of one image, that says nothing about all


def test_paths_in_a_file_of_answers_open_nothing(copy: Path, tmp_path: Path) -> None:
    private = tmp_path / "private.png"
    Image.new("RGB", (8, 8), "red").save(private)
    write_predictions(copy, path=str(private))
    page = write(copy, out=tmp_path / "a.html")
    assert 'class="tiny"' not in page and "the data is not what it was" in page


def test_pictures_can_be_left_out(copy: Path, tmp_path: Path) -> None:
    (copy / "check").mkdir()
    for name in ("check/train_batch.png", "predictions_val.png", "neighbors.png"):
        Image.new("RGB", (8, 8), "red").save(copy / name)
    assert write(copy, out=tmp_path / "a.html").count("<img") > 20
    page = write(copy, out=tmp_path / "a.html", samples=False)
    assert "<img" not in page and "<span>student</span>" in page


@pytest.mark.parametrize(
    ("kilojoules", "shown"), [((100, 500, 50), "CPU 0.15 kWh"), ((3, 4.5, 0.5), "CPU 5.0 kJ"), ((), None)]
)
def test_energy_of_all_starts_is_added(
    kilojoules: tuple[float, ...], shown: str | None, copy: Path, tmp_path: Path
) -> None:
    """The last start counts from zero again."""
    rows = [f"{step},{value}" for step, value in enumerate(kilojoules)]
    (copy / "metrics.csv").write_text("\n".join(["step,train/cpu_energy_kj", *rows]) + "\n")
    page = write(copy, out=tmp_path / "a.html", samples=False)
    assert (shown in page) if shown else ("kJ" not in page and "kWh" not in page)


def test_what_is_gone_is_said(copy: Path, tmp_path: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("val.npz", "gone.npz"))
    write_predictions(copy)
    page = write(copy, out=tmp_path / "a.html")
    assert "The validation images cannot be shown" in page and "gone.npz" in page
    assert "<span>student</span> 2 (75%)" in page and 'class="tiny"' not in page


@pytest.mark.parametrize(
    "source",
    [
        "{kind: image_folder, root: s3://stranger/images}",
        "{kind: file_list, path: list.csv}",
        "{kind: tar, path: https://example.org/a.tar}",
        "{kind: huggingface, path: stranger/images}",
    ],
)
def test_urls_are_read_only_if_that_is_allowed(
    source: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[Any] = []
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: connections.append(arguments))
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **options: connections.append(arguments))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text(f"path,label\nhttps://example.org/a.png,{json.dumps(CLASSES[2])}\n")
    text = (copy / "config.yaml").read_text()
    changed = re.sub(r"source:\n      kind: arrays\n      images: \S+val.npz\n", f"source: {source}\n", text)
    assert changed != text
    (copy / "config.yaml").write_text(changed)
    assert "which --remote allows to read" in write(copy, out=tmp_path / "a.html")
    assert not connections


def test_secrets_are_hidden(copy: Path, tmp_path: Path) -> None:
    with (copy / "config.yaml").open("a") as file:
        file.write("api_key: hunter2\nurl: https://me:hunter2@example.org/a?token=hunter2\n")
    with (copy / "train.log").open("a") as file:
        file.write("2026-01-01 00:00:00,000 WARNING https://me:hunter2@example.org\n")
    page = write(copy, out=tmp_path / "a.html", samples=False)
    assert "hunter2" not in page and "api_key: &#39;***&#39;" in page


FILES = ["history.jsonl", "config.yaml", "result.json", "metrics.csv", "environment.json", "train.log"]
DAMAGE: dict[str, Callable[[Path], object]] = {
    **{name: make for name, make in SPECIAL.items() if name != "socket"},
    "nested": lambda path: path.write_bytes(b"[" * DEEP + b"]" * DEEP),
    "nested objects": lambda path: path.write_bytes(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 50),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_hostile_files_are_left_out(kind: str, copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "baseline")
    for name in [*FILES, "predictions_val.csv", "predictions_val.png"]:
        remove(copy / name)
        DAMAGE[kind](copy / name)
    page = write(copy, out=tmp_path / "a.html", samples=False)
    assert "<h2>Results</h2>" in page and "No metrics are known" in page


def test_links_out_of_the_folder_are_not_followed(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("2026-01-01 00:00:00,000 WARNING hunter2\nhunter2: 1\n")
    for name in [*FILES, "predictions_val.csv"]:
        remove(copy / name)
        (copy / name).symlink_to(secret)
    shutil.rmtree(copy / "baseline")
    (copy / "baseline").symlink_to(tmp_path)
    page = write(copy, out=tmp_path / "a.html", samples=False)
    assert "hunter2" not in page and "leads out of the folder" in page


def test_impossible_results_end_nothing(copy: Path, tmp_path: Path) -> None:
    found = json.loads((copy / "result.json").read_text())
    found["val"] |= {
        "confusion": [[-1, 2], [3]],
        "classes": [EVIL],
        "class_accuracy": [None, 1e308, -5.0],
        "top1": 1e999,
        "metrics": {EVIL: [[1]], "a": 1e308, "cosine_to_teacher.x": True},
    }
    (copy / "result.json").write_text(json.dumps(found))
    page = write(copy, out=tmp_path / "a.html", samples=False)
    assert "<script" not in page


def test_large_files_make_no_large_page(copy: Path, tmp_path: Path) -> None:
    history = (copy / "history.jsonl").read_text()
    (copy / "history.jsonl").write_text(history * 1000)
    columns = [f"val/{number}" for number in range(500)]
    rows = [",".join(map(str, [step, *range(step, 500 + step)])) for step in range(50)]
    (copy / "metrics.csv").write_text("\n".join([",".join(["step", *columns]), *rows]))
    result = json.loads((copy / "result.json").read_text())["val"]
    result["metrics"] = {str(number): 0.5 for number in range(1000)}
    (copy / "result.json").write_text(json.dumps({str(number): result for number in range(100)}))
    packages = {f"package{number}": "1.0" for number in range(9000)}
    (copy / "environment.json").write_text(json.dumps({"packages": packages}))
    with (copy / "train.log").open("a") as log:
        log.write("2026-01-01 00:00:00,000 WARNING x\n" * 5000)
        log.writelines(f"2026-01-01 00:00:00,000 WARNING {number}{'x' * 3000}\n" for number in range(1000))
    assert len(write(copy, out=tmp_path / "a.html", samples=False)) < 2_000_000


def status(*events: dict[str, Any], folder: Path) -> tuple[str, str]:
    lines = [json.dumps({"time": "2026-01-01 00:00:00+00:00", **event}) for event in events]
    (folder / "history.jsonl").write_text("\n".join(lines))
    return status_of(read_run(folder, "a"))


def test_status_is_that_of_the_last_start(tmp_path: Path) -> None:
    start, end = {"event": "start", "step": 0}, {"event": "end", "step": 7, "outcome": "trained"}
    results = {"event": "results", "step": 7}
    assert status(start, end, results, folder=tmp_path) == ("Finished", "good")
    assert status(start, end, folder=tmp_path) == ("Trained; results are missing", "open")
    assert status(start, end, results, start, folder=tmp_path)[0].startswith("Not ended")
    failed = {**end, "outcome": "RuntimeError: no"}
    assert status(start, failed, folder=tmp_path) == ("Failed at step 7: RuntimeError: no", "bad")
    stopped = {**end, "outcome": "stopped with exit status 143"}
    assert status(start, stopped, folder=tmp_path)[1] == "open"


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        find_runs(tmp_path)
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        write_report(tmp_path / "none")


def test_a_folder_that_cannot_be_listed_is_an_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match="cannot be listed: Permission denied"):
        find_runs(copy)


def test_command_names_the_file(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs[0]), "--no-samples", "--out", str(tmp_path / "new" / "a.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "a.html")
    os.symlink(tmp_path / "victim", tmp_path / "link.html")
    assert main(["report", str(runs[0]), "--no-samples", "--out", str(tmp_path / "link.html")]) == 1
    assert "is a link" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium-headless-shell is not installed")
def test_it_is_readable_in_a_browser(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name, folders in {"one": runs[:1], "two": runs}.items():
        write(*folders, out=tmp_path / f"{name}.html")
    colors = set()
    with open_browser() as browser:
        for name in ("one", "two"):
            for width, dark in ((1280, False), (390, False), (390, True)):
                file = tmp_path / f"{name}.html"
                found = browser.open(file, width=width, dark=dark)
                assert browser.requests == [file.as_uri()] and browser.complaints == []
                assert found["scroll"] <= found["client"] == width
                assert found["smallest"] >= 14 and found["lines"] > 10 and found["scripts"] == 0
                assert found["pictures"] and all(found["pictures"])
                assert EVIL in found["text"] and "Results" in found["text"] and "val" in found["text"]
                colors.add((found["back"], found["color"]))
        browser.screenshot(tmp_path / "page.png")
    assert len(colors) == 2
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 390 and len(np.unique(np.asarray(picture.convert("L")))) > 50
