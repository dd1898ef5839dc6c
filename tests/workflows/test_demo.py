"""The demo writes real digits once, separates validation, and reports its metrics in summary.json."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from kd_pipeline.errors import ConfigError
from kd_pipeline.workflows.demo import run_demo, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root)
    return root


def numbers(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.rglob("*.png")}


def test_splits_are_disjoint_and_complete(digits: Path) -> None:
    train, val = numbers(digits / "train"), numbers(digits / "val")
    assert not train & val
    assert train | val == set(range(1797))


def test_split_is_stratified(digits: Path) -> None:
    for label in range(10):
        num_train = len(numbers(digits / "train" / str(label)))
        num_val = len(numbers(digits / "val" / str(label)))
        assert num_val == pytest.approx((num_train + num_val) / 5, abs=1)


def test_files_hold_their_digits(digits: Path) -> None:
    data = load_digits()
    for path in sorted(digits.rglob("*.png"))[::97]:
        number = int(path.stem)
        assert data.target[number] == int(path.parent.name)
        with Image.open(path) as image:
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert image.size == (32, 32)
        assert np.corrcoef(small.ravel(), data.images[number].ravel())[0, 1] > 0.95


def test_existing_digits_are_not_rewritten(digits: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*.png")}
    assert write_digits(digits) == (len(numbers(digits / "train")), len(numbers(digits / "val")))
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*.png")} == before


@pytest.mark.slow
def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    summary = run_demo(["train.epochs=1", "run_dir=runs/short", "seed=3"])
    assert json.loads((tmp_path / "runs/short/summary.json").read_text()) == summary
    for key in ("teacher_top1", "student_alone_top1", "student_distilled_top1", "agreement"):
        assert 0.1 < summary[key] <= 1, key
        # a whole number of validation images
        assert summary[key] * summary["num_val"] == pytest.approx(round(summary[key] * summary["num_val"]), abs=1e-3)
    assert summary["teacher_backend"] in ("openvino", "pytorch")
    assert summary["teacher_precision"] == "fp32"
    assert summary["images_per_s"] > 0
    assert (summary["seed"], summary["epochs"]) == (3, 1)
    assert (tmp_path / "runs/short/teacher.onnx").is_file()
    assert json.loads((tmp_path / "runs/short/classes.json").read_text()) == [str(digit) for digit in range(10)]
    with Image.open(summary["grid"]) as grid:
        assert min(grid.size) > 200


def test_wrong_override_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.epoch.*epochs"):
        run_demo(["train.epoch=1"])
