"""Whole runs on a GPU: they train, resume, validate and export, and a step waits for the device once."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning")

from kd_pipeline.batch import KDBatch
from kd_pipeline.cli import main
from kd_pipeline.errors import NonFiniteError
from kd_pipeline.models.modules import is_channels_last
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows import stage_run
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows._train import train
from tests import own_ops, runs
from tests.gpu.tiny import PLUGINS, config_on, norm_of_difference, run_on
from tests.training import networks
from tests.training.tiny_run import EVAL, TRAIN, logged, settings, weights, write_digits

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]

STEPS_PER_EPOCH = 6
RUN = Path("runs/tiny")
PYTORCH = "teacher.backend=pytorch"
"""OpenVINO, which would be chosen on a CPU, may not be installed beside CUDA."""
OPTIONS = ["data.device=cuda", "train.precision=bf16-mixed", PYTORCH]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and a teacher; tests may add runs."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


BF16 = {"train__precision": "bf16-mixed", "train__channels_last": True}
NETWORKS = networks.__name__
TERMS = {
    "loss": "dist",
    "features": [
        {"loss": "relational", "queue_size": 40},
        {"loss": "cosine", "student": "2", "projector": "mlp", "standardize": "channels"},
        {"loss": "soft_target", "temperature": {"start": 4, "end": 2}},
    ],
}
"""The second compares the input of the student's last layer with the teacher's logits."""
AUGMENTED = {
    **TRAIN,
    "interpolation": "random",
    "affine": {"rotate": 20, "scale": [0.8, 1.2]},
    "brightness": 0.3,
    "order": ["affine", "color", {"factory": f"{own_ops.__name__}:shift", "num_draws": 1}],
}
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"train__clip": 1.0, "train__log_gradient_norm": True, "train__compare_with_teacher": True},
    "bf16": {**BF16, "train__ema": {"decay": 0.9}},
    "bf16 compiled": {**BF16, "train__compile": True, "train__ema": {"decay": 0.9}},
    "compiled, partial batch": {"data__batch_size": 20, "data__train__last_batch": "keep", "train__compile": True},
    "bf16-true": {"train__precision": "bf16-true"},
    "16-mixed": {"train__precision": "16-mixed", "train__accumulate": 2},
    "float16 images": {
        "train__precision": "16-mixed",
        "data__train__transform": {**TRAIN, "dtype": "float16"},
        "data__val__transform": {**EVAL, "dtype": "float16"},
    },
    "mixed": {**BF16, "data__train__mix": {"mixup": 0.4, "cutmix": 1.0}},
    "batch norm": {**BF16, "student": {"factory": "tests.training.networks:with_batchnorm"}},
    "skipping": {**BF16, "train__max_nonfinite_steps": 2, "train__validate_every_steps": 4},
    "teacher as the student": {**BF16, "teacher__precision": "auto", "teacher__compile": None},
    "teacher as a graph": {**BF16, "teacher__cuda_graph": True},
    "terms": {**BF16, "distill": TERMS},
    "compiled terms": {**BF16, "distill": TERMS, "train__compile": True},
    "heads": {**BF16, "distill": {"heads": {"aux": 0.4}}, "student": {"factory": f"{NETWORKS}:with_head"}},
    "augmented": {"data__train__transform": AUGMENTED},
    "average of the best": {**BF16, "train__average_best": 2, "train__epochs": 3},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_run_trains_and_exports(digits: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = {name: value for name, value in changes.items() if not name.startswith("teacher__")}
    of_teacher = {name.removeprefix("teacher__"): changes[name] for name in changes.keys() - ours.keys()}
    if of_teacher:
        model = {"factory": "tests.training.networks:plain", "checkpoint": digits / "teacher.pt"}
        ours["teacher"] = {"model": model, "precision": "fp32", "compile": False, **of_teacher}
    found = run_on("cuda", digits, tmp_path / "gpu", **ours)
    rows = logged(tmp_path / "gpu")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert any(row.get("train/memory_gib", 0) > 0 for row in rows)
    assert any(row.get("train/device_memory_gib", 0) > 0 for row in rows)
    assert found.evaluations["val"].num_samples == 40
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0] or "mix" in str(changes) or "queue_size" in str(changes)


def test_run_in_float32_is_near_that_of_the_cpu(digits: Path, tmp_path: Path) -> None:
    losses = []
    for device in ("cuda", "cpu"):
        run_on(device, digits, tmp_path / device, train__log_gradient_norm=True)
        rows = [row for row in logged(tmp_path / device) if "train/loss" in row]
        losses.append([(row["train/loss"], row["train/gradient_norm"]) for row in rows])
    ours, theirs = torch.tensor(losses)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.01)


def test_students_end_as_alone(digits: Path, tmp_path: Path) -> None:
    factory = "tests.training.networks:with_dropout"
    students = {
        "one": {"factory": factory, "train": {"ema": {"decay": 0.5}}},
        "two": {"factory": factory, "train": {"optimizer": {"name": "adamw", "lr": 0.01}}},
    }
    config = config_on("cuda", digits, tmp_path / "many", student=None, students=students)
    assert not train(config, plugins=PLUGINS).failures
    for name in students:
        train(config.for_student(name).model_copy(update={"run_dir": tmp_path / name}), plugins=PLUGINS)
        # With the same random numbers for dropout; operations on a GPU may add in another order.
        assert norm_of_difference(weights(tmp_path / "many" / name), weights(tmp_path / name)) < 1e-3


def test_student_and_batches_are_in_channels_last_order(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `auto` in half precision."""
    seen = set()
    step = DistillModule.training_step

    def spy(module: DistillModule, batch: KDBatch, number: int) -> Tensor:
        seen.add((is_channels_last(module.student), next(module.student.parameters()).is_cuda, batch.images.is_cuda))
        return step(module, batch, number)

    monkeypatch.setattr(DistillModule, "training_step", spy)
    run_on("cuda", digits, tmp_path / "run", train__precision="bf16-mixed", train__epochs=1)
    assert seen == {(True, True, True)}


class Seen:
    """What each step of a run was trained on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: dict[int, dict[str, Tensor]] = {}
        self.stop_at: int | None = None
        step = DistillModule.training_step

        def spy(module: DistillModule, batch: KDBatch, number: int) -> Tensor:
            self.batches[module.trainer.global_step] = {
                name: tensor.clone() for name, tensor in {"images": batch.images, **batch.teacher}.items()
            }
            if module.trainer.global_step == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(module, batch, number)

        monkeypatch.setattr(DistillModule, "training_step", spy)


@pytest.mark.parametrize("stop_at", [1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH + 2])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_interrupted_run_resumes_to_the_same_end(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile: bool, stop_at: int
) -> None:
    """Pixels and logits are the same bits. Weights may differ by the order in which a GPU adds up gradients."""
    changes = {**BF16, "train__compile": compile, "train__ema": {"decay": 0.9}}
    seen = Seen(monkeypatch)
    run_on("cuda", digits, tmp_path / "whole", **changes)
    whole, seen.batches, seen.stop_at = seen.batches, {}, stop_at
    with pytest.raises(SystemExit) as left:
        run_on("cuda", digits, tmp_path / "parts", **changes)
    assert left.value.code == 143 and max(seen.batches) == stop_at
    seen.stop_at = None
    run_on("cuda", digits, tmp_path / "parts", **changes)
    assert seen.batches.keys() == whole.keys() and len(whole) == 2 * STEPS_PER_EPOCH
    for number, batch in whole.items():
        assert all(torch.equal(seen.batches[number][name], batch[name]) for name in batch), number
    assert norm_of_difference(weights(tmp_path / "parts"), weights(tmp_path / "whole")) < 1e-3


def test_equal_runs_end_alike(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    run_on("cuda", digits, tmp_path / "first", **BF16)
    first, seen.batches = seen.batches, {}
    run_on("cuda", digits, tmp_path / "second", **BF16)
    for number, batch in first.items():
        assert all(torch.equal(seen.batches[number][name], batch[name]) for name in batch), number
    assert norm_of_difference(weights(tmp_path / "first"), weights(tmp_path / "second")) < 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        BF16,
        {**BF16, "train__ema": {"decay": 0.9}, "train__clip": 1.0},
        {**BF16, "train__compile": True},
        {"distill": {"features": [{"loss": "relational", "queue_size": 40}]}},
    ],
    ids=["fp32", "bf16", "ema and clip", "compiled", "queue"],
)
def test_step_waits_for_the_device_once(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """From the forward pass to the optimizer step, where nothing is logged."""
    waits: dict[int, list[str]] = {}
    context = warnings.catch_warnings(record=True)
    start, end = DistillModule.on_train_batch_start, DistillModule.on_train_batch_end

    def watch(module: DistillModule, batch: KDBatch, number: int) -> None:
        start(module, batch, number)
        torch.cuda.set_sync_debug_mode("warn")
        waits[module.trainer.global_step] = context.__enter__()
        warnings.simplefilter("always")

    def stop(module: DistillModule, outputs: Any, batch: KDBatch, number: int) -> None:
        nonlocal context
        torch.cuda.set_sync_debug_mode("default")
        context.__exit__(None, None, None)
        context = warnings.catch_warnings(record=True)
        end(module, outputs, batch, number)

    monkeypatch.setattr(DistillModule, "on_train_batch_start", watch)
    monkeypatch.setattr(DistillModule, "on_train_batch_end", stop)
    run_on("cuda", digits, tmp_path / "run", train__log_every_steps=1000, **changes)
    found = {
        step: [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
        for step, caught in waits.items()
    }
    assert len(found) == 2 * STEPS_PER_EPOCH
    usual = [places for step, places in found.items() if step > 0 and (step + 1) % STEPS_PER_EPOCH]
    assert all(len(places) == 1 and "nonfinite.py" in places[0] for places in usual), usual


@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "top_k": 3}], ids=["whole", "top 3 in float16"])
def test_recording_trains_like_its_teacher(digits: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    live = run_on("cuda", digits, tmp_path / "live", **BF16)
    model = {"factory": "tests.training.networks:plain", "checkpoint": digits / "teacher.pt"}
    teacher = {"model": model, "precision": "fp32", "compile": False}
    described = settings(digits, str(tmp_path / "live"), data__device="cuda", teacher=teacher, **BF16)
    recording = record(described, RecordSettings(out=tmp_path / "recording", **options), plugins=PLUGINS)
    replayed = run_on("cuda", digits, tmp_path / "replayed", teacher={"path": recording}, probe={}, **BF16)
    distance = norm_of_difference(weights(replayed.folder), weights(live.folder))
    assert distance < (0.1 if options else 1e-3)


def test_nan_of_the_student_is_explained(digits: Path, tmp_path: Path) -> None:
    optimizer = {"name": "sgd", "lr": 1e30}
    with pytest.raises(NonFiniteError, match=r"Lower train\.optimizer\.lr"):
        run_on("cuda", digits, tmp_path / "run", train__optimizer=optimizer)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher and its student, both trained on the GPU by the command."""
    folder = tmp_path_factory.mktemp("finished")
    runs.write_data(folder)
    (folder / "tiny.yaml").write_text(runs.CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "-c", "tiny.yaml", "stage=all", *OPTIONS]) == 0
    return folder


@pytest.fixture
def in_finished(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def test_command_trains_teacher_and_student(finished: Path) -> None:
    for folder in (finished / RUN, finished / RUN / "teacher"):
        assert json.loads((folder / "result.json").read_text())["val"]["num_samples"] == 70
        assert (folder / "exported" / "model.onnx").is_file()


@pytest.mark.parametrize("model", [[str(RUN)], []], ids=["student and teacher", "teacher"])
def test_eval_on_the_gpu_matches_the_cpu(in_finished: Path, tmp_path: Path, model: list[str]) -> None:
    found = []
    for device in ("cuda", "cpu"):
        out = tmp_path / f"{device}.json"
        arguments = [
            "eval",
            "-c",
            "tiny.yaml",
            *model,
            "--set",
            f"data.device={device}",
            "--set",
            PYTORCH,
            "--out",
            str(out),
        ]
        assert main(arguments) == 0
        found.append(json.loads(out.read_text()))
    ours, theirs = (flat(each) for each in found)
    assert ours.keys() == theirs.keys()
    for name in ("top1", "loss"):
        for key in ours:
            if key.endswith(name) and isinstance(theirs[key], float):
                assert ours[key] == pytest.approx(theirs[key], abs=0.05), key


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings, by their paths."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {path: leaf for key, each in value.items() for path, leaf in flat(each, f"{prefix}/{key}").items()}


def test_predict_on_the_gpu_matches_the_cpu(
    in_finished: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for device in ("cuda", "cpu"):
        assert main(["predict", str(RUN), str(photo_folder), "--json", "--device", device]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(found[0]) == 37
    for ours, theirs in zip(*found, strict=True):
        assert ours["image"] == theirs["image"]
        assert ours["top"][0]["probability"] == pytest.approx(theirs["top"][0]["probability"], abs=0.1)


def test_check_finds_nothing(in_finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", "tiny.yaml", *OPTIONS]) == 0, capsys.readouterr().out


def test_command_trains_from_its_recording(in_finished: Path, tmp_path: Path) -> None:
    out, run_dir = tmp_path / "recording", tmp_path / "replayed"
    assert main(["record", "-c", "tiny.yaml", "--out", str(out), *OPTIONS]) == 0
    replay = [f"teacher={{path: {out}}}", f"run_dir={run_dir}"]
    assert main(["train", "-c", "tiny.yaml", *OPTIONS[:2], *replay]) == 0
    assert json.loads((run_dir / "result.json").read_text())["val"]["num_samples"] == 70


def test_deterministic_run_on_the_gpu(finished: Path, tmp_path: Path) -> None:
    """In its own process: cuBLAS reads its environment once."""
    ends = []
    for name in ("first", "second"):
        run_dir = tmp_path / name
        arguments = ["data.device=cuda", "train.deterministic=true", f"run_dir={run_dir}", "stage=all", PYTORCH]
        command("train", "-c", "tiny.yaml", *arguments, folder=finished)
        ends.append(weights(run_dir))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    facts = tmp_path / "facts.json"
    command("verify", str(tmp_path / "first"), "--out", str(facts), folder=finished)
    verified = json.loads(facts.read_text())
    assert verified["holds"] and "bit for bit" in verified["verdict"], verified


def command(*arguments: str, folder: Path) -> None:
    """Run `kd-pipeline` in a process of its own, without the setting of cuBLAS that it makes itself."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-m", "kd_pipeline", *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *_own_path()])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _own_path() -> list[str]:
    """The folders in PYTHONPATH, from which the packages of this process may come."""
    return [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def test_doctor_finds_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])  # its status depends on what else is installed
    found = json.loads(capsys.readouterr().out)
    assert torch.cuda.get_device_name(0) in [gpu["name"] for gpu in found["gpus"]]
    assert "ok" in [check["status"] for check in found["checks"] if check["name"] == "torch.cuda"]


def test_student_is_left_on_the_cpu_or_gpu_as_a_whole(digits: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What is exported and evaluated after the training is on one device."""
    devices = []
    write = stage_run.write_results

    def spy(folder: Any, config: Any, student: nn.Module, *rest: Any) -> None:
        devices.append({tensor.device.type for tensor in student.state_dict().values()})
        write(folder, config, student, *rest)

    monkeypatch.setattr(stage_run, "write_results", spy)
    run_on("cuda", digits, tmp_path / "run", train__ema={"decay": 0.9}, train__epochs=1)
    assert [len(found) for found in devices] == [1]
