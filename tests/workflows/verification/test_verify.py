"""A run verifies, is left as it is, and whatever was changed about it is named."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits

from kd_pipeline.cli import main
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.evidence import is_kept, read_evidence
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows import results
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.verification.verify import VerifyReport, VerifySettings, verify
from tests.training import networks, tiny_run

NUM_TRAIN, NUM_VAL = 48, 16
PLUGIN = networks.__name__
FILES_ALONE = VerifySettings(replay=False, results=False, batches=100)
"""What most changes are found by."""


def write_split(folder: Path, name: str, first: int, count: int) -> None:
    """A list of PNG files with their labels."""
    digits = load_digits()
    (folder / name).mkdir()
    rows = ["path,label"]
    for number in range(first, first + count):
        image = (digits.images[number] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(image).save(folder / name / f"{number:03}.png")
        rows.append(f"{name}/{number:03}.png,{digits.target[number]}")
    (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")


def split(folder: Path, name: str, transform: dict[str, Any]) -> dict[str, Any]:
    return {"source": {"kind": "file_list", "path": folder / f"{name}.csv"}, "transform": transform}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, teacher and a run of two epochs, whose best student is that of the first."""
    folder = tmp_path_factory.mktemp("verified")
    write_split(folder, "train", 0, NUM_TRAIN)
    write_split(folder, "val", NUM_TRAIN, NUM_VAL)
    torch.manual_seed(5)
    torch.save(networks.plain().state_dict(), folder / "teacher.pt")
    teacher = {"model": {"factory": f"{PLUGIN}:plain", "checkpoint": folder / "teacher.pt"}, "backend": "pytorch"}
    config = tiny_run.settings(
        folder,
        "run",
        data__train=split(folder, "train", tiny_run.TRAIN),
        data__val=split(folder, "val", tiny_run.EVAL),
        teacher=teacher,
        student__factory=f"{PLUGIN}:with_dropout",
        train__optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9},
        train__select_by="val/loss",
        train__select_mode="max",
        train__ema={"decay": 0.5},
        **tiny_run.WITH_ONNX,
    )
    tiny_run.train_without_plots(config)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the folder; its config still names the data and the teacher of the original."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied"


def check(folder: Path, settings: VerifySettings = FILES_ALONE, *overrides: str) -> VerifyReport:
    return verify(folder / "run", settings, overrides=overrides, plugins=[PLUGIN], report=lambda line: None)


def states(report: VerifyReport) -> dict[str, str]:
    return {fact.name: fact.state for fact in report.facts}


def differing(report: VerifyReport) -> dict[str, str]:
    return {fact.name: fact.text for fact in report.differs}


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), os.stat(file).st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
def test_run_verifies_and_stays_as_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(finished)
    status = main(["verify", str(finished / "run"), "--plugin", PLUGIN, "--batches", "100", "--out", "facts.json"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert contents(finished) == before and os.listdir() == ["facts.json"]
    found = json.loads(Path("facts.json").read_text())
    assert {fact["state"] for fact in found["facts"]} == {"holds"}, printed
    assert [fact["name"] for fact in found["facts"]] == [
        *("config", "evidence", "checkpoints", "exported student", "result files", "training data", "validation data"),
        *("stream", "teacher", "images", "labels", "teacher outputs", "first steps", "last steps", "ONNX file"),
        "result.json",
    ]
    assert "steps 1 to 6: 6 losses and the weights after steps 3, 6, bit for bit" in " ".join(printed.split())
    assert "steps 4 to 6: " in printed
    assert " ".join(printed.split("\n\n")[-1].split()) == (
        "this student came from this config and this data: all 6 steps were trained again, and all that was done again "
        "is the same bit for bit"
    )


def edit_list(folder: Path) -> str:
    path = folder / "train.csv"
    path.write_text(path.read_text().replace("train/007.png,7", "train/007.png,2"))
    return f"data.train.source.path={path}"


def replace_image(folder: Path) -> str:
    shutil.copy(folder / "train" / "009.png", folder / "train" / "007.png")
    return f"data.train.source.path={folder / 'train.csv'}"


def remove_image(folder: Path) -> str:
    path = folder / "train.csv"
    path.write_text(path.read_text().replace("train/007.png,7\n", ""))
    return f"data.train.source.path={path}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "names", "text"),
    [
        (
            edit_list,
            {"training data", "labels"},
            "samples of each class: 2 3 → 4, 7 5 → 4; other labels: train/007.png",
        ),
        (replace_image, {"training data", "images"}, "other content: train/007.png"),
        (remove_image, {"training data", "stream"}, "samples: 48 → 47"),
    ],
)
def test_changed_data_is_named(copied: Path, change: Callable[[Path], str], names: set[str], text: str) -> None:
    found = differing(check(copied, FILES_ALONE, change(copied)))
    assert names <= found.keys() and text in found["training data"], found


@pytest.mark.slow
def test_moved_data_is_the_same(copied: Path) -> None:
    report = check(copied, FILES_ALONE, f"data.train.source.path={copied / 'train.csv'}")
    assert report.holds and report.verdict.startswith("nothing differs, but no step was trained again")


@pytest.mark.slow
def test_changed_config_is_named_and_trains_otherwise(copied: Path) -> None:
    path = copied / "run" / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.05", "lr: 0.1"))
    found = differing(check(copied, VerifySettings(steps=2, results=False)))
    assert found["config"].startswith(
        "train.optimizer.lr: 0.05 → 0.1. The old values are those in last.ckpt and evidence.jsonl"
    )
    assert re.search(r"epoch 1, batch 2 \(step 2\): loss \S+ → \S+", found["first steps"])
    assert "batch 1 (" not in found["first steps"]  # its loss is that of the start


@pytest.mark.slow
def test_exported_weights_of_a_different_run_are_found(copied: Path) -> None:
    exported = copied / "run" / "exported"
    weights = {name: each * 1.5 for name, each in load_file(exported / "model.safetensors").items()}
    content = save(weights)
    (exported / "model.safetensors").write_bytes(content)
    torch.save(weights, copied / "run" / "checkpoints" / "best_student.pt")
    description = json.loads((exported / "model.json").read_text())
    description["weights_sha256"] = hashlib.sha256(content).hexdigest()
    (exported / "model.json").write_text(json.dumps(description))
    found = differing(check(copied, VerifySettings(replay=False)))
    assert {*found} == {"exported student", "result files", "ONNX file", "result.json"}
    assert "are not those of best.ckpt, such as" in found["exported student"]


@pytest.mark.slow
def test_changed_result_is_named(copied: Path) -> None:
    path = copied / "run" / "result.json"
    result = json.loads(path.read_text())
    result["val"]["top1"] = 0.99
    path.write_text(json.dumps(result))
    found = differing(check(copied, VerifySettings(replay=False)))
    assert {*found} == {"result files", "result.json"} and "val/top1: 0.99 → " in found["result.json"]


@pytest.mark.slow
def test_replaced_teacher_is_named(copied: Path) -> None:
    torch.manual_seed(6)
    torch.save(networks.plain().state_dict(), copied / "teacher.pt")
    report = check(copied, VerifySettings(), f"teacher.model.checkpoint={copied / 'teacher.pt'}")
    assert {"teacher"} <= differing(report).keys() <= {"teacher", "result.json"}
    assert states(report)["first steps"] == states(report)["teacher outputs"] == "cannot be checked"


def edited(line: dict[str, Any], **changes: Any) -> str:
    return json.dumps(line | changes)


@pytest.mark.slow
def test_changed_evidence_is_named(copied: Path) -> None:
    path = copied / "run" / "evidence.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    second = next(place for place, line in enumerate(lines) if line.get("batch") == 1)
    kept = path.read_text().splitlines()

    loss = float.fromhex(lines[second]["terms"]["loss"])
    terms = lines[second]["terms"] | {"loss": (loss * (1 + 1e-6)).hex()}
    path.write_text("\n".join([*kept[:second], edited(lines[second], terms=terms), *kept[second + 1 :]]))
    found = differing(check(copied, VerifySettings(steps=2, results=False)))
    assert {*found} == {"first steps"} and "epoch 1, batch 2 (step 2): loss" in found["first steps"]

    # On a different machine this is a rounding.
    machine = lines[0]["machine"] | {"torch": "1.0"}
    path.write_text(
        "\n".join(
            [
                edited(lines[0], machine=machine),
                *kept[1:second],
                edited(lines[second], terms=terms),
                *kept[second + 1 :],
            ]
        )
    )
    report = check(copied, VerifySettings(steps=2, results=False))
    assert report.holds and "the same within rounding (torch 1.0 → " in report.verdict

    path.write_text("\n".join([*kept[:second], *kept[second + 1 :]]))
    assert differing(check(copied))["evidence"].startswith("missing: epoch 1, batch 2")

    path.write_text("\n".join(["no line", *kept]))
    assert differing(check(copied))["evidence"].startswith("lines that are none: 1")

    weights = next(place for place, line in enumerate(lines) if line["kind"] == "weights")
    student = lines[weights]["weights"] | {"student": {"digest": "0" * 64, "value": "0x1.0p+0"}}
    path.write_text("\n".join([*kept[:weights], edited(lines[weights], weights=student), *kept[weights + 1 :]]))
    assert "student in best.ckpt, step 3: 00000000 → " in differing(check(copied))["checkpoints"]

    path.unlink()
    report = check(copied, VerifySettings(results=False))
    assert report.holds and states(report)["evidence"] == states(report)["first steps"] == "cannot be checked"


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config\.yaml"):
        verify(tmp_path)


def test_kept_batches_are_the_same_for_all() -> None:
    kept = [[number for number in range(1000) if is_kept(3, epoch, number, 1000)] for epoch in (0, 1, 2)]
    assert kept == [[0, 1, 2, 3, 4, 5, 6, 7, *kept[0][8:]], [0, 1, *kept[1][2:]], [0, 1, *kept[2][2:]]]
    assert all(0 < len(each) <= 10 for each in kept) and kept[1] != kept[2]
    assert kept[1] != [number for number in range(1000) if is_kept(4, 1, number, 1000)]


def baseline(folder: Path, name: str, **changes: Any) -> Config:
    """A student alone on the same data."""
    train_split, val_split = split(folder, "train", tiny_run.TRAIN), split(folder, "val", tiny_run.EVAL)
    splits = {"data__train": train_split, "data__val": val_split}
    return tiny_run.settings(folder, name, stage="baseline", teacher=None, **splits, **changes)


@pytest.mark.slow
def test_run_that_was_resumed_with_more_epochs_is_trained_again(finished: Path) -> None:
    """Each part with its own settings: the learning rate follows the number of epochs."""
    for epochs in (1, 2):
        schedule = {"kind": "cosine"}
        config = baseline(finished, "resumed", train__epochs=epochs, train__schedule=schedule)
        tiny_run.train_without_plots(config)
    folder, settings = finished / "resumed" / "baseline", VerifySettings(full=True)
    report = verify(folder, settings, plugins=[PLUGIN], report=lambda line: None)
    assert report.holds and (report.num_replayed, report.num_steps) == (6, 6), report
    assert states(report)["all steps"] == "holds"


@pytest.mark.slow
def test_what_an_object_was_cannot_be_checked(finished: Path) -> None:
    with mock.patch.object(results, "_plot"):
        train(baseline(finished, "object", student=None, train__epochs=1), student=networks.plain())
    report = verify(finished / "object" / "baseline", report=lambda line: None)
    found = {fact.name: fact for fact in report.facts}
    assert report.holds and found["exported student"].state == "holds"
    assert found["first steps"].state == "cannot be checked"
    assert "started in Python with objects (student)" in found["first steps"].text


LINE = {"kind": "weights", "epoch": 0, "weights": {}}


def test_what_a_killed_process_did_after_its_checkpoint_is_gone(tmp_path: Path) -> None:
    start = {"kind": "start", "config": {}, "identity": {}, "machine": {}, "processes": 1}
    lines = [start | {"step": 0}, LINE | {"step": 2}, LINE | {"step": 4}]
    (tmp_path / "evidence.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "wei')
    folder = RunFolder(tmp_path)
    folder.start_evidence()
    folder.add_evidence(json.dumps(start | {"step": 2}))
    found = read_evidence(folder.evidence)
    assert found is not None and [*found.weights] == [2] and found.damaged == [4]
    assert [each.step for each in found.starts] == [0, 2]
