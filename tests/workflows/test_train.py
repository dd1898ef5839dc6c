"""`kd-pipeline train`: each stage writes a complete run, and a stopped run resumes to the same end."""

import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kd_pipeline.cli import main
from kd_pipeline.config.config import load_config
from kd_pipeline.evaluation._evaluate import Evaluation, evaluate
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.run_lock import lock_folder
from kd_pipeline.workflows.exported import open_model_file
from tests.runs import NO_ONNX, finish, start, start_ranks, start_torchrun

RUN = Path("runs/tiny")
# Lightning's advice on workers, loggers and the trainer's options.
in_this_process = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture
def work(trained_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the folder with a trained teacher."""
    shutil.copytree(trained_teacher, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="module")
def finished(trained_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped; read only."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    shutil.copytree(trained_teacher, folder)
    status, output = finish(start(folder))
    assert status == 0, output
    return folder


RunHere = Callable[..., tuple[int, str]]


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> RunHere:
    """The command in this process, which saves the time of the imports; returns the exit status and the output."""
    caplog.set_level(logging.INFO, "kd_pipeline")

    def run(folder: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        caplog.clear()
        status = main(["train", "-c", "tiny.yaml", *arguments])
        printed = capfd.readouterr()
        return status, printed.out + printed.err + caplog.text

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / RUN / "checkpoints" / "last.ckpt")["state_dict"]


def assert_same_end(first: Path, second: Path) -> None:
    """Bitwise the same weights, and the same final metrics."""
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for name, tensor in load_file(first / RUN / "exported" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(second / RUN / "exported" / "model.safetensors")[name]), name
    assert (first / RUN / "result.json").read_text() == (second / RUN / "result.json").read_text()


@pytest.mark.slow
def test_run_folder_is_complete(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    for name in (
        "config.yaml", "environment.json", "history.jsonl", "metrics.csv", "train.log", "classes.json", "result.json",
        "curves.png", "confusion_val.png", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
        "checkpoints/best_student.pt", "exported/model.safetensors", "exported/model.json", "exported/model.onnx",
    ):  # fmt: skip
        if name != "classes.json":  # the classes of arrays have no names
            assert (RUN / name).stat().st_size > 0, name
    chosen = ["train.select_by=val/top1", "train.select_mode=max"]  # which the run has filled in
    assert load_config(RUN / "config.yaml") == load_config("tiny.yaml", chosen)
    result = json.loads((RUN / "result.json").read_text())
    assert result["val"]["num_samples"] == 70 and 0 <= result["val"]["top1"] <= 1
    assert result["val"]["agreement"] is not None


@pytest.mark.slow
def test_export_is_best_student(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    student = open_model_file(RUN, image_shape=(3, 16, 16), device=torch.device("cpu")).model
    best = torch.load(RUN / "checkpoints" / "best_student.pt", weights_only=True)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    images = torch.randn(5, 3, 16, 16)
    teacher = OnnxRuntimeTeacher(RUN / "exported" / "model.onnx")
    torch.testing.assert_close(teacher(images)["logits"], student(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_checkpoint_has_no_teacher(finished: Path) -> None:
    checkpoint = load_checkpoint(finished / RUN / "checkpoints" / "last.ckpt")
    teacher = load_checkpoint(finished / RUN / "teacher" / "checkpoints" / "last.ckpt")
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])
    num_trained = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    student = open_model(ModelSettings(builtin="small_resnet", num_classes=10, kwargs={"width": 4}))
    assert num_trained == len(list(student.parameters()))
    shapes = {tuple(tensor.shape) for tensor in checkpoint["state_dict"].values()}
    assert any(tuple(tensor.shape) not in shapes for tensor in teacher["state_dict"].values())
    assert checkpoint["run"]["teacher"] is not None


@pytest.mark.slow
def test_rerun_after_end_changes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "work")
    status, output = finish(start(tmp_path / "work"))
    assert status == 0, output
    assert_same_end(finished, tmp_path / "work")


@pytest.mark.slow
def test_killed_run_resumes_exactly(finished: Path, work: Path) -> None:
    numbers = random.Random(0)
    started = time.monotonic()
    process = start(work, "run_dir=runs/timed")
    while process.poll() is None and not (work / "runs" / "timed" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    first_save_s = time.monotonic() - started
    process.kill()
    process.communicate()
    num_kills = 0
    for _ in range(30):
        if num_kills == 4:
            break
        process = start(work, NO_ONNX)
        time.sleep(numbers.uniform(0.8, 1.2) * first_save_s)
        num_kills += process.poll() is None
        process.kill()
        process.communicate()
    status, output = finish(start(work, NO_ONNX))
    assert status == 0, output
    assert_same_end(finished, work)
    assert num_kills >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signaled_run_resumes_exactly(finished: Path, work: Path, number: signal.Signals, wanted: int) -> None:
    process = start(work, NO_ONNX)
    while process.poll() is None and not (work / RUN / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    process.send_signal(number)
    status, output = finish(process)
    assert status == wanted, output
    assert "Traceback" not in output
    status, output = finish(start(work, NO_ONNX))
    assert status == 0, output
    assert_same_end(finished, work)


@in_this_process
@pytest.mark.slow
def test_different_run_is_refused(finished: Path, tmp_path: Path, run_here: RunHere) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    before = (work / RUN / "config.yaml").read_bytes()
    status, output = run_here(work, "student.kwargs.width=6")
    assert status == 1 and "student.kwargs.width: 4 → 6" in output, output
    teacher = "teacher={model: {builtin: small_resnet, kwargs: {width: 8}}, backend: pytorch}"
    status, output = run_here(work, teacher)
    assert status == 1 and "teacher: fingerprint " in output and " → " in output, output
    status, output = run_here(work, "data.train.source.images=val.npz")
    assert status == 1 and "data: fingerprint " in output and " → " in output, output
    assert "Traceback" not in output
    assert_same_end(finished, work)
    assert (work / RUN / "config.yaml").read_bytes() == before
    assert (work / RUN / "train.log").read_text().count("ERROR StateError: ") == 3


@in_this_process
@pytest.mark.slow
def test_fresh_moves_only_the_own_run(finished: Path, tmp_path: Path, run_here: RunHere) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    (work / RUN / "mine.txt").write_text("notes")
    teacher = (work / RUN / "teacher" / "checkpoints" / "last.ckpt").read_bytes()
    status, output = run_here(work, "--fresh", "seed=4", "train.epochs=1", NO_ONNX)
    assert status == 0 and "was moved to runs/tiny/earlier/1" in output, output
    earlier = work / RUN / "earlier" / "1"
    assert (earlier / "result.json").read_bytes() == (finished / RUN / "result.json").read_bytes()
    assert (earlier / "config.yaml").read_bytes() == (finished / RUN / "config.yaml").read_bytes()
    assert (work / RUN / "teacher" / "checkpoints" / "last.ckpt").read_bytes() == teacher
    assert (work / RUN / "mine.txt").is_file() and "seed: 4" in (work / RUN / "config.yaml").read_text()
    status, output = run_here(work, "--fresh", "seed=4", "train.epochs=1", "stage=all")
    assert status == 0, output
    assert {path.name for path in (work / RUN / "earlier").iterdir()} == {"1", "2"}
    assert (work / RUN / "teacher" / "earlier" / "1" / "checkpoints" / "last.ckpt").read_bytes() == teacher


@pytest.mark.slow
def test_second_process_is_told_who_trains(work: Path) -> None:
    first = start(work, "train.epochs=200")
    while first.poll() is None and not (work / RUN / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    try:
        for arguments in ((), ("--fresh",)):
            status, output = finish(start(work, "train.epochs=200", *arguments))
            assert status == 1 and f"runs/tiny is in use by process {first.pid} on " in output, output
            assert "train -c tiny.yaml train.epochs=200" in output and f"kill {first.pid}" in output
    finally:
        first.kill()
        first.communicate()
    with lock_folder(work / RUN, otherwise="wait"):
        pass  # the kernel released it


@pytest.mark.slow
def test_history_has_every_start(work: Path) -> None:
    process = start(work, "train.epochs=200", NO_ONNX)
    while process.poll() is None and not (work / RUN / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process)
    step = load_checkpoint(work / RUN / "checkpoints" / "last.ckpt")["global_step"]
    epochs = step // 10 + 1
    status, output = finish(start(work, f"train.epochs={epochs}", NO_ONNX))
    assert status == 0, output
    first, stopped, second, ended, results = map(json.loads, (work / RUN / "history.jsonl").read_text().splitlines())
    assert (first["event"], first["step"], first["changes"]) == ("start", 0, [])
    assert (stopped["event"], stopped["step"], stopped["outcome"]) == ("end", step, "stopped with exit status 143")
    assert (second["event"], second["step"]) == ("start", step)
    assert second["changes"] == [f"train.epochs: 200 → {epochs}"] and f"train.epochs={epochs}" in second["command"]
    assert (ended["event"], ended["outcome"], results["event"]) == ("end", "trained", "results")
    assert results["step"] == ended["step"] == epochs * 10


@in_this_process
@pytest.mark.slow
def test_results_name_the_teacher(finished: Path, tmp_path: Path, run_here: RunHere) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    status, output = run_here(work)
    assert status == 0 and "finished: 2 of 2 epochs; to train longer set train.epochs" in output, output
    teacher = json.loads((work / RUN / "teacher" / "result.json").read_text())["val"]
    result = json.loads((work / RUN / "result.json").read_text())["val"]
    assert {name: result["teacher"][name] for name in ("top1", "top5")} == {
        name: pytest.approx(teacher[name]) for name in ("top1", "top5")
    }
    line = rf"val +teacher +\d+ +{teacher['top1']:.1%} +{teacher['top5']:.1%} "
    assert re.search(line, output) and re.search(line, (work / RUN / "train.log").read_text())


@in_this_process
@pytest.mark.slow
def test_longer_teacher_of_a_student_is_refused(work: Path, run_here: RunHere) -> None:
    status, output = run_here(work, "stage=all", "train.limit_train_batches=null")
    assert status == 0, output
    before = (work / RUN / "teacher" / "exported" / "model.safetensors").read_bytes()
    status, output = run_here(work, "stage=all", "train.epochs=3")
    assert status == 1 and "set stage=distill to resume that" in output, output
    assert (work / RUN / "teacher" / "exported" / "model.safetensors").read_bytes() == before
    status, output = run_here(work, "stage=distill", "train.epochs=3", NO_ONNX)
    assert status == 0, output


@pytest.mark.slow
def test_refused_ranks_end_together(finished: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    with lock_folder(work / RUN, otherwise="wait"):
        status, output = finish(start_torchrun(work))
    assert status == 1 and "runs/tiny is in use by process" in output, output


@pytest.mark.slow
def test_two_ranks_resume_exactly(trained_teacher: Path, tmp_path: Path) -> None:
    for name in ("undisturbed", "stopped"):
        shutil.copytree(trained_teacher, tmp_path / name)
    half = "data.batch_size=16"
    for status, output in map(finish, start_ranks(tmp_path / "undisturbed", half, NO_ONNX)):
        assert status == 0, output
    process = start_torchrun(tmp_path / "stopped", half, NO_ONNX)
    while process.poll() is None and not (tmp_path / "stopped" / RUN / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, workers):  # which would train on for a while without torchrun
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()
    status, output = finish(start_torchrun(tmp_path / "stopped", half, NO_ONNX))
    assert status == 0, output
    resumed = re.search(r"resumed +from \S+ at epoch \d of 2, step (\d+)", output)
    assert resumed is not None and int(resumed[1]) < 20, output
    assert_same_end(tmp_path / "undisturbed", tmp_path / "stopped")


DISTILL = """
  features: [{loss: feature_mse, student: "4", teacher: "4", weight: 0.1, projector: conv}]
  distill_weight: {start: 0.5, end: 1.0}
  loss: dist
  task_weight: 0.5
"""


@pytest.mark.slow
def test_many_settings_together(work: Path) -> None:
    config = (work / "tiny.yaml").read_text()
    config = config.replace("student:", f"distill:{DISTILL}student:")
    (work / "tiny.yaml").write_text(config)
    weights_of_teacher = RUN / "teacher" / "exported" / "model.safetensors"
    status, output = finish(
        start(
            work,
            f"teacher.model.checkpoint={weights_of_teacher}",
            "teacher.backend=pytorch",
            'teacher.features=["4"]',
            "data.train.transform.auto_augment={kind: trivialaugment}",
            "data.train.mix={mixup: 0.2, cutmix: 1.0}",
            "data.more={again: {source: {kind: arrays, images: val.npz}, transform: {preset: eval, size: 16}}}",
            "data.test={source: {kind: arrays, images: val.npz}, transform: {preset: eval, size: 16, resize: 16}}",
            "train.ema={decay: 0.9}",
            "train.accumulate=2",
            "train.clip=1.0",
            "train.deterministic=true",
            "train.early_stopping={patience: 5}",
            "train.log_gradient_norm=true",
            "train.compare_with_teacher=true",
            "train.limit_val_batches=2",
            "train.schedule={kind: linear, warmup_epochs: 0.5}",
            "train.precision=bf16-mixed",
            NO_ONNX,
        )
    )
    assert status == 0, output
    columns = (work / RUN / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/feature_mse.4", "train/gradient_norm", "train/teacher_share", "val/agreement", "again/top1"} <= set(
        columns
    )
    result = json.loads((work / RUN / "result.json").read_text())
    assert result["val"]["num_samples"] == 64 and result["test"]["num_samples"] == 70
    exported = load_file(work / RUN / "exported" / "model.safetensors")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in exported.values())
    assert not any("projector" in name for name in exported)


@in_this_process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "scores", "num_evaluations"),
    [
        ("baseline", (0.1, 0.2), 2),
        ("baseline", (0.2, 0.1), 3),
        ("distill", (0.1, 0.2), 3),  # the second validation was without the teacher
    ],
)
def test_best_student_is_validated_once(
    work: Path,
    run_here: RunHere,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    scores: tuple[float, float],
    num_evaluations: int,
) -> None:
    measured: list[Evaluation] = []

    def evaluate_with_score(*arguments: Any, **options: Any) -> Evaluation:
        found = evaluate(*arguments, **options)
        if len(measured) < len(scores):
            found = replace(found, top1=scores[len(measured)])
        measured.append(found)
        return found

    monkeypatch.setattr("kd_pipeline.workflows.validation.evaluate", evaluate_with_score)
    status, output = run_here(work, f"stage={stage}", "train.export.onnx=false")
    assert status == 0, output
    assert len(measured) == num_evaluations
    folder = RUN if stage == "distill" else RUN / stage
    assert json.loads((work / folder / "result.json").read_text())["val"] == json.loads(
        json.dumps(measured[-1].to_dict())
    )
    log = (work / folder / "train.log").read_text()
    assert log.index("plots: ") < log.index("split  network")  # the table is the last thing that is seen


@in_this_process
@pytest.mark.slow
def test_ema_is_exported_without_validation(work: Path, run_here: RunHere) -> None:
    status, output = run_here(work, "data.val=null", "train.ema={decay: 0.9}", "train.limit_train_batches=3", NO_ONNX)
    assert status == 0, output
    average = load_checkpoint(work / RUN / "checkpoints" / "last.ckpt")["ema"]["student"]
    for name, tensor in load_file(work / RUN / "exported" / "model.safetensors").items():
        assert torch.equal(tensor, average[name]), name


@in_this_process
@pytest.mark.slow
def test_student_from_teacher(work: Path, run_here: RunHere) -> None:
    wide = "student={builtin: small_resnet, kwargs: {width: 8}}"
    frozen = ("train.optimizer.lr=1e-12", "train.limit_train_batches=1", "train.epochs=1", NO_ONNX)
    status, output = run_here(work, wide, "student_from_teacher={'3': '3', '8': '8'}", *frozen)
    assert status == 0, output
    student = load_file(work / RUN / "exported" / "model.safetensors")
    teacher = load_file(work / RUN / "teacher" / "exported" / "model.safetensors")
    torch.testing.assert_close(student["3.body.0.weight"], teacher["3.body.0.weight"], rtol=0, atol=1e-6)
    assert not torch.allclose(student["4.body.0.weight"], teacher["4.body.0.weight"], atol=1e-3)
    status, output = run_here(work, wide, "student_from_teacher={'3': '4'}", "run_dir=runs/other", *frozen)
    assert status == 1 and "Traceback" not in output, output


@pytest.mark.slow
def test_incomplete_config_says_what_to_set(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(work / RUN / "teacher")
    monkeypatch.chdir(work)
    for arguments, message in (
        ((), "teacher.model has no weights: set its checkpoint or pretrained, or train it first with stage=teacher"),
        (("teacher=null",), "stage: distill needs a teacher"),
        (("student=null",), "there is no student to train: set student"),
        (("stage=teacher", "teacher={onnx: a.onnx}"), "stage: teacher trains the network of teacher.model"),
        (("run_dir=null",), "a run needs a folder: set run_dir"),
        (("stage=teach",), "should be 'teacher', 'baseline', 'distill' or 'all'"),
    ):
        assert main(["train", "-c", "tiny.yaml", *arguments]) == 1
        output = capsys.readouterr().err
        assert message in output and "Traceback" not in output
