"""What a run validates and when, how it selects the best, and what it exports; with and without a crash."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline.data.sources import Arrays
from kd_pipeline.data.transforms import EvalTransform
from kd_pipeline.errors import ConfigError, EngineError, MissingPackageError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.teachers.tensorrt.manifest import read_engine
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.workflows._train import train
from kd_pipeline.workflows.exported import read_exported
from tests.training import networks, tiny_run
from tests.training.tiny_run import NUM_TRAIN, NUM_VAL, distance, logged, settings, weights

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

STEPS = NUM_TRAIN // 16
"""Steps of an epoch."""
CALLS: list[float] = []
"""Values that `scripted` returned."""
SCRIPT: list[float] = []
"""Values for it to return, one per call, then 0."""


class Crash(BaseException):
    """Stands for the death of the process."""


def largest(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """A custom metric."""
    return {"largest": float(logits.abs().max()), "count": len(labels)}


def scripted(logits: Tensor, labels: Tensor) -> dict[str, float]:
    CALLS.append(SCRIPT[len(CALLS)] if len(CALLS) < len(SCRIPT) else 0.0)
    if CALLS[-1] == -1:
        raise Crash
    return {"scripted": CALLS[-1]}


CUSTOM = f"{__name__}:{largest.__name__}"
SCRIPTED = {"name": f"{__name__}:{scripted.__name__}"}


def run(folder: Path, name: str, **changes: Any) -> Path:
    return train(settings(folder, name, **changes), plugins=[networks.__name__, __name__]).folder


@pytest.fixture
def script() -> Iterator[list[float]]:
    CALLS.clear()
    SCRIPT.clear()
    yield SCRIPT
    SCRIPT.clear()


def validated(folder: Path, metric: str = "val/top1") -> list[tuple[int, float]]:
    """Steps and values."""
    return [(int(row["step"]), row[metric]) for row in logged(folder) if metric in row]


def student_of(checkpoint: Path) -> tiny_run.Weights:
    return {name.removeprefix("student."): value for name, value in load_checkpoint(checkpoint)["state_dict"].items()}


@pytest.mark.slow
def test_extra_metrics_select_best(digits: Path) -> None:
    best = {}
    for mode in ("max", "min"):
        folder = run(
            digits,
            f"metrics_{mode}",
            train__epochs=3,
            train__metrics=[{"name": "CohenKappa", "kwargs": {"weights": "linear"}}, {"name": CUSTOM}],
            train__select_by="val/largest",
            train__select_mode=mode,
        )
        values = [value for _, value in validated(folder, "val/largest")]
        assert len(set(values)) == 3
        assert [count for _, count in validated(folder, "val/count")] == [NUM_VAL] * 3
        assert len(validated(folder, "val/CohenKappa")) == 3
        best[mode] = json.loads((folder / "result.json").read_text())["val"]["metrics"]["largest"]
        assert best[mode] == pytest.approx(max(values) if mode == "max" else min(values), rel=1e-6)
    assert best["max"] > best["min"]


def assert_no_run(folder: Path) -> None:
    """The folder tells of the error, and of no training."""
    assert "Error: " in (folder / "train.log").read_text()
    assert {file.name for file in folder.iterdir()} == {"run.lock", "train.log"}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("CohenKapa", "torchmetrics.classification has no 'CohenKapa'; did you mean 'CohenKappa'"),
        ("os:getcwd", "metrics: os:getcwd would run code of the module os; allow it with --plugin os"),
        (f"{__name__}:smallest", "has no function called 'smallest'"),
    ],
)
def test_unknown_metric_fails_early(digits: Path, metric: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(digits, "unknown", train__metrics=[{"name": metric}])
    assert_no_run(digits / "unknown")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__select_by": "val/top_1"}, "train.select_by: 'val/top_1' is not measured; did you mean 'val/top1'"),
        ({"train__select_by": "other/top1"}, "'other/top1' is not measured; there are 'val/top1'"),
        ({"train__select_by": "val/agreement"}, "'val/agreement' is not measured"),
        ({"train__early_stopping": {"metric": "val/CohenKappa"}}, "train.early_stopping.metric: .* is not measured"),
    ],
)
def test_unmeasured_metric_fails_early(digits: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(digits, "unmeasured", **changes)
    assert_no_run(digits / "unmeasured")


def test_metric_function_takes_no_kwargs(digits: Path) -> None:
    with pytest.raises(ValueError, match="gets only logits and labels; remove kwargs"):
        settings(digits, "kwargs", train__metrics=[{"name": CUSTOM, "kwargs": {"top_k": 2}}])


@pytest.mark.slow
def test_validate_every_steps_leaves_training_alone(digits: Path) -> None:
    usual = run(digits, "usual")
    often = run(digits, "often", train__validate_every_steps=4)
    assert [step for step, _ in validated(usual)] == [STEPS - 1, 2 * STEPS - 1]
    assert [step for step, _ in validated(often)] == [3, STEPS - 1, 7, 2 * STEPS - 1]
    assert distance(weights(often), weights(usual)) == 0
    assert set(validated(usual, "val/loss")) < set(validated(often, "val/loss"))


@pytest.mark.slow
def test_validate_every_steps_with_accumulation(digits: Path) -> None:
    often = run(
        digits, "accumulated", data__batch_size=8, train__accumulate=2, train__epochs=1, train__validate_every_steps=2
    )
    assert [step for step, _ in validated(often)] == [1, 3, STEPS - 1]


@pytest.mark.slow
def test_best_within_epoch(digits: Path, script: list[float]) -> None:
    script += [0.1, 0.2, 0.9, 0.3]  # at the steps 4, 6, 8 and 12
    folder = run(
        digits,
        "middle",
        train__metrics=[SCRIPTED],
        train__select_by="val/scripted",
        train__validate_every_steps=4,
    )
    assert load_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == 8
    best = torch.load(folder / "checkpoints" / "best_student.pt", weights_only=True)
    assert distance(best, student_of(folder / "checkpoints" / "best.ckpt")) == 0
    assert distance(best, weights(folder)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("save_every_steps", [2, None])
def test_resume_after_crash_in_validation(
    digits: Path, script: list[float], save_every_steps: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "train__metrics": [SCRIPTED, {"name": CUSTOM}],
        "train__select_by": "val/scripted",
        "train__validate_every_steps": 4,
        "train__save_every_steps": save_every_steps,
    }
    values = [0.5, 0.2, 0.4, 0.1]
    script[:] = values
    undisturbed = run(digits, str(tmp_path / "undisturbed"), **options)
    # Validations before the last checkpoint are not repeated.
    for crash_at, num_known in enumerate({2: [0, 1, 2, 3], None: [0, 0, 2, 2]}[save_every_steps]):
        folder = str(tmp_path / f"crashed{crash_at}")
        CALLS.clear()
        script[:] = [*values[:crash_at], -1.0]
        with pytest.raises(Crash):
            run(digits, folder, **options)
        CALLS.clear()
        script[:] = values[num_known:]
        assert_same_run(run(digits, folder, **options), undisturbed)
        assert len(CALLS) == len(values) - num_known + 1  # and one at the end


def assert_same_run(resumed: Path, undisturbed: Path) -> None:
    assert distance(weights(resumed), weights(undisturbed)) == 0
    for metric in ("val/scripted", "val/largest", "val/loss"):
        assert validated(resumed, metric) == validated(undisturbed, metric)
    for name in ("best.ckpt", "last.ckpt"):
        ours, theirs = (load_checkpoint(folder / "checkpoints" / name) for folder in (resumed, undisturbed))
        assert ours["global_step"] == theirs["global_step"]
        assert distance(ours["state_dict"], theirs["state_dict"]) == 0


def test_start_opens_nothing_twice(
    digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also not for the probe, which judges the teacher by the first batches of the run."""
    caplog.set_level("INFO", "kd_pipeline")
    opened: list[str] = []
    original = Arrays.__init__

    def counted(self: Arrays, images: Path, *args: Any, **options: Any) -> None:
        opened.append(Path(images).name)
        original(self, images, *args, **options)

    monkeypatch.setattr(Arrays, "__init__", counted)
    run(digits, "once", probe={"num_samples": 8})
    assert sorted(opened) == ["train.npz", "val.npz"]
    (line,) = [line for line in caplog.messages if line.startswith("teacher probe: ")]
    assert "on 8 training images" in line or "top-1 is" in line


@pytest.mark.slow
def test_export_uses_validation_transform(digits: Path) -> None:
    net = {"builtin": "small_resnet", "kwargs": {"width": 4}}
    transform = {"preset": "eval", "size": 12, "resize": 16, "mean": [0.5, 0.4, 0.3]}
    changes = {"stage": "baseline", "train__epochs": 1, "data__val__transform": transform, **tiny_run.WITH_ONNX}
    folder = run(digits, "larger", student=net, **changes)
    found = read_exported(folder)
    assert found is not None and found[1].transform == EvalTransform.model_validate(transform)
    assert found[1].model.num_classes == 10
    assert read_onnx(folder / "exported" / "model.onnx").images.shape[2:] == (12, 12)


def test_export_without_validation_split(digits: Path) -> None:
    train_transform = {**tiny_run.TRAIN, "mean": [0.5, 0.4, 0.3], "interpolation": "bicubic"}
    folder = run(digits, "alone", data__val=None, train__epochs=1, data__train__transform=train_transform)
    found = read_exported(folder)
    assert found is not None
    assert found[1].transform == EvalTransform(size=8, mean=(0.5, 0.4, 0.3), interpolation="bicubic")


def test_export_without_onnx(digits: Path) -> None:
    folder = run(digits, "weights", train__epochs=1, train__export={"onnx": False})
    assert sorted(path.name for path in (folder / "exported").iterdir()) == ["model.json", "model.safetensors"]
    with pytest.raises(ValueError, match="an engine is built from the ONNX file; remove onnx: false"):
        settings(digits, "engine", train__export={"onnx": False, "engine": {}})


@pytest.mark.slow
def test_export_engine(digits: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    wanted = {"precision": "fp16", "runtime": "tensorrt_rtx", "profiles": [{"min": 1, "opt": 4, "max": 8}]}
    before = os.umask(0o002)  # under which folders are made that the group can write to
    try:
        folder = run(digits, "engine", train__epochs=1, train__export={"engine": wanted})
    finally:
        os.umask(before)
    manifest = read_engine(folder / "exported" / "model.engine").manifest
    assert manifest is not None and manifest.precision == "fp16"
    assert manifest.onnx_sha256 == read_onnx(folder / "exported" / "model.onnx").sha256
    assert manifest.parity.images == "the split val of the run" and manifest.parity.num_images == NUM_VAL


def test_folder_in_which_the_engine_would_be_refused_fails_early(digits: Path) -> None:
    (digits / "loose").mkdir()
    (digits / "loose").chmod(0o775)
    with pytest.raises(EngineError, match=f"group may write to {digits}/loose; .*; or set a different run_dir"):
        run(digits, "loose", train__export={"engine": {"runtime": "tensorrt_rtx"}})
    assert not [*(digits / "loose").iterdir()]


def test_missing_tensorrt_fails_early(digits: Path) -> None:
    missing = next((name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name) is None), None)
    if missing is None:
        pytest.skip("both are installed")
    with pytest.raises(MissingPackageError, match=missing):
        run(digits, "early", train__export={"engine": {"runtime": missing}})
    assert_no_run(digits / "early")
