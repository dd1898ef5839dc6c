"""Every setting of a run has its effect: each test fails if the setting does nothing."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd_pipeline import losses
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.workflows._train import train
from tests.training import networks, tiny_run
from tests.training.tiny_run import (
    EVAL,
    NUM_TRAIN,
    NUM_VAL,
    TRAIN,
    WITH_ONNX,
    Weights,
    distance,
    logged,
    run,
    settings,
    weights,
)

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

ONE_STEP: dict[str, Any] = {"train__epochs": 1, "train__limit_train_batches": 1}
LR = 0.05


@pytest.fixture(scope="module")
def default_run(digits: Path) -> Path:
    """A run with the default settings; read only."""
    return run(digits, "usual").folder


def initialized(network: Callable[[], nn.Module]) -> nn.Module:
    """The network as a run with seed 3 initializes it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return network()


@pytest.fixture
def start() -> Weights:
    """The initial weights of a student."""
    return initialized(networks.plain).state_dict()


@pytest.mark.slow
def test_accumulate_matches_larger_batch(digits: Path, default_run: Path) -> None:
    found = run(digits, "accumulate", data__batch_size=8, train__accumulate=2).folder
    # Sums of 16 gradients in a different order: some units in the last place of weights below 1.
    assert distance(weights(found), weights(default_run)) < 1e-6
    assert [row["step"] for row in logged(found)] == [row["step"] for row in logged(default_run)]
    alone = run(digits, "halves", data__batch_size=8).folder
    assert distance(weights(alone), weights(default_run)) > 1e-3


@pytest.mark.slow
def test_clip_and_unclipped_norm(digits: Path, start: Weights) -> None:
    free = run(digits, "free", **ONE_STEP, train__log_gradient_norm=True).folder
    (row, *_) = logged(free)
    norm = row["train/gradient_norm"]
    assert distance(weights(free), start) == pytest.approx(LR * norm, rel=1e-4)
    clipped = run(digits, "clipped", **ONE_STEP, train__log_gradient_norm=True, train__clip=norm / 4).folder
    assert distance(weights(clipped), start) == pytest.approx(LR * norm / 4, rel=1e-4)
    assert logged(clipped)[0]["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_gradient_norm_is_off_by_default(default_run: Path) -> None:
    assert not any("train/gradient_norm" in row for row in logged(default_run))


@pytest.mark.slow
def test_limits_on_batches(digits: Path) -> None:
    found = run(digits, "limits", train__limit_train_batches=2, train__limit_val_batches=1).folder
    assert load_checkpoint(found / "checkpoints" / "last.ckpt")["global_step"] == 2 * 2
    assert [row["epoch"] for row in logged(found)] == [1, 1, 2, 2]
    assert tiny_run.result(found)["val"]["num_samples"] == 16


@pytest.mark.slow
def test_resume_with_limit_is_exact(digits: Path) -> None:
    undisturbed = run(digits, "at once", train__limit_train_batches=2).folder
    run(digits, "later", train__limit_train_batches=2, train__epochs=1)
    later = run(digits, "later", train__limit_train_batches=2).folder
    assert distance(weights(later), weights(undisturbed)) == 0


@pytest.mark.slow
def test_early_stopping_stays_stopped(digits: Path) -> None:
    stopping = {
        "train__epochs": 9,
        "train__optimizer__lr": 1e-12,
        "train__early_stopping": {"metric": "val/top1", "patience": 2},
    }
    found = run(digits, "early", **stopping).folder
    last = found / "checkpoints" / "last.ckpt"
    assert load_checkpoint(last)["epoch"] == 2
    before = last.read_bytes(), (found / "result.json").read_bytes()
    run(digits, "early", **stopping)
    assert load_checkpoint(last)["epoch"] == 2
    assert (last.read_bytes(), (found / "result.json").read_bytes()) == before


@pytest.mark.slow
def test_early_stopping_metric_and_mode(digits: Path) -> None:
    for mode, last_epoch in (("max", 1), ("min", 3)):
        stopping = {"metric": "val/loss", "mode": mode, "patience": 1}
        found = run(digits, mode, stage="baseline", train__epochs=4, train__early_stopping=stopping).folder
        losses_of_epochs = [row["val/loss"] for row in logged(found) if "val/loss" in row]
        assert losses_of_epochs == sorted(losses_of_epochs, reverse=True)
        assert load_checkpoint(found / "checkpoints" / "last.ckpt")["epoch"] == last_epoch


def test_early_stopping_unmeasured_metric(digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping\.metric: .*'val/top3'.*val/top5"):
        run(digits, "nowhere", **ONE_STEP, train__early_stopping={"metric": "val/top3"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "match"),
    [
        ("nondeterministic", "put_ does not have a deterministic implementation"),
        ("nondeterministic_backward", r"train\.deterministic: put_, which .* set train\.deterministic: false"),
    ],
)
def test_deterministic(digits: Path, factory: str, match: str) -> None:
    student = {"factory": f"tests.training.networks:{factory}"}
    run(digits, f"free {factory}", **ONE_STEP, student=student)
    with pytest.raises(ConfigError, match=match):
        run(digits, factory, **ONE_STEP, student=student, train__deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({"data__train__transform": {**TRAIN, "dtype": "float16"}}, r"\[any, 3, 8, 8\] float32"),
        ({"data__val__transform": {**EVAL, "size": 6}}, r"\[any, 3, 6, 6\] float32"),
    ],
    ids=["dtype", "size"],
)
def test_images_that_the_teacher_cannot_take_are_refused_before_the_training(
    digits: Path, request: pytest.FixtureRequest, changes: dict[str, Any], images: str
) -> None:
    """In the evaluation after it, the teacher would fail on them."""
    name = request.node.name
    model = {"factory": "tests.training.networks:plain", "checkpoint": digits / "teacher.pt"}
    changes = {**ONE_STEP, "teacher": {"model": model}, **changes}
    with pytest.raises(TeacherError, match=rf"data\.val\.transform makes images {images}"):
        run(digits, name, **changes)
    assert not (digits / name / "checkpoints").exists()
    # What the message advises works.
    training = settings(digits, name, **changes).data.split("train").transform
    advised = {**EVAL, "size": training.size, "dtype": training.dtype}
    assert run(digits, name, **{**changes, "data__val__transform": advised}).evaluations["val"].agreement is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "computed", "kept"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision(digits: Path, precision: str, computed: torch.dtype, kept: torch.dtype) -> None:
    networks.observed_dtypes.clear()
    found = run(
        digits, precision, student={"factory": "tests.training.networks:observed"}, train__precision=precision
    ).folder
    assert networks.observed_dtypes == {computed}
    state = load_checkpoint(found / "checkpoints" / "last.ckpt")["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {kept}
    exported = load_file(found / "exported" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


@pytest.mark.slow
def test_compile(digits: Path, default_run: Path) -> None:
    torch._dynamo.utils.counters.clear()
    undisturbed = run(digits, "compiled", train__compile=True).folder
    assert distance(weights(undisturbed), weights(default_run)) < 1e-5
    assert torch._dynamo.utils.counters["inductor"]
    # Not again for validation, nor for its smaller last batch; and the step that compiles is no measure of speed.
    # The three graphs are those of the student, of the cross-entropy and of the soft targets.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert ["train/images_per_s" in row for row in logged(undisturbed)[:2]] == [False, True]
    run(digits, "compiled again", train__compile=True, train__epochs=1)
    again = run(digits, "compiled again", train__compile=True).folder
    assert distance(weights(again), weights(undisturbed)) == 0
    for folder in (undisturbed, again):
        exported = load_file(folder / "exported" / "model.safetensors")
        assert exported.keys() == networks.plain().state_dict().keys()
        checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        assert not any("_orig_mod" in name for name in checkpoint["state_dict"])


@pytest.mark.slow
def test_mean_of_the_best_students_is_exported(digits: Path) -> None:
    folder = run(digits, "averaged", train__average_best=2).folder
    kept = [torch.load(path, weights_only=True) for path in (folder / "checkpoints" / "top").iterdir()]
    assert len(kept) == 2
    for name, tensor in load_file(folder / "exported" / "model.safetensors").items():
        torch.testing.assert_close(tensor, (kept[0][name] + kept[1][name]) / 2)
    with pytest.raises(ConfigError, match=r"train\.average_best .* no metric says which"):
        run(digits, "unmeasured", train__average_best=2, data__val=None)


@pytest.mark.slow
def test_channels_last(digits: Path, default_run: Path) -> None:
    usual = run(digits, "nchw", train__channels_last=False).folder
    assert distance(weights(usual), weights(default_run)) < 1e-5  # the same but for the last digits
    assert [weights(folder)["0.weight"].is_contiguous() for folder in (usual, default_run)] == [True, False]
    # What began in one order resumes in the other, with the optimizer's state in the order of the weights.
    momentum = {"name": "sgd", "lr": LR, "momentum": 0.9}
    for epochs, setting in ((1, False), (2, True)):
        found = run(
            digits, "switched", train__channels_last=setting, train__epochs=epochs, train__optimizer=momentum
        ).folder
        optimizer = load_checkpoint(found / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
        assert optimizer[0]["momentum_buffer"].is_contiguous() == weights(found)["0.weight"].is_contiguous()
        assert weights(found)["0.weight"].is_contiguous() == (not setting)


def test_baseline_uses_labels_only(digits: Path, default_run: Path) -> None:
    outcome = run(digits, "both", stage="baseline", teacher={"onnx": digits / "nowhere.onnx"}, **WITH_ONNX)
    assert outcome.folder == digits / "both" / "baseline"
    rows = logged(outcome.folder)
    assert all(row["train/loss"] == row["train/task"] and row["train/task_weight"] == 1 for row in rows)
    assert not any(name.endswith(("distill", "teacher_share")) for row in rows for name in row)
    assert rows[0]["train/task"] == logged(default_run)[0]["train/task"]  # same initial weights, same images
    assert (outcome.folder / "exported" / "model.onnx").is_file()


UNLABELED: dict[str, Any] = {
    "distill": {"distill_weight": 1.0, "task_weight": 0.0},
    "probe": {"num_samples": 32, "strict": True},
}


@pytest.mark.slow
def test_unlabeled_training_images(digits: Path, start: Weights) -> None:
    unlabeled = tiny_run.split(digits, "unlabeled", tiny_run.TRAIN)
    with_val = run(digits, "unlabeled", **UNLABELED, **WITH_ONNX, data__train=unlabeled)
    without = run(digits, "unlabeled, no val", **UNLABELED, **WITH_ONNX, data__train=unlabeled, data__val=None)
    labeled = run(digits, "labels not used", distill=UNLABELED["distill"])
    assert distance(weights(with_val.folder), start) > 1e-3
    assert distance(weights(with_val.folder), weights(without.folder)) == 0
    assert distance(weights(with_val.folder), weights(labeled.folder)) == 0
    top1 = with_val.evaluations["val"].top1
    assert top1 is not None and not without.evaluations
    for folder in (with_val.folder, without.folder):
        assert not any("train/top1" in row or "train/task" in row for row in logged(folder))
        assert (folder / "exported" / "model.onnx").is_file()


@pytest.mark.slow
def test_unlabeled_validation_images(digits: Path) -> None:
    outcome = run(
        digits,
        "val unlabeled",
        data__val=tiny_run.split(digits, "unlabeled", tiny_run.EVAL),
        train__compare_with_teacher=True,
        train__select_by="val/agreement",
    )
    assert outcome.evaluations["val"].top1 is None
    assert outcome.evaluations["val"].agreement is not None


@pytest.mark.slow
def test_ema_of_teacher_is_distilled(digits: Path) -> None:
    teacher = {"model": {"factory": "tests.training.networks:with_batchnorm"}, "backend": "pytorch"}
    average = {"stage": "teacher", "teacher": teacher, "train__ema": {"decay": 0.5, "warmup": False}}
    folder = run(digits, "ema", **average, data__val=None).folder
    checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    weights_file = folder / "exported" / "model.safetensors"
    exported = load_file(weights_file)
    for name, tensor in exported.items():
        assert torch.equal(tensor, checkpoint["ema"]["student"][name])
    assert not torch.equal(exported["4.weight"], checkpoint["state_dict"]["student.4.weight"])
    found = logged(run(digits, "ema", teacher=teacher).folder)[0]["train/distill"]
    with KDDataLoader.from_config(settings(digits, "ema", teacher=None), "train") as loader:
        images = next(iter(loader)).images
    net = networks.with_batchnorm()
    net.load_state_dict(exported)
    wanted = losses.soft_target(initialized(networks.plain)(images), net.eval()(images), temperature=4.0)
    assert found == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.slow
def test_test_split_is_evaluated_once(digits: Path) -> None:
    images = tiny_run.split(digits, "train", tiny_run.EVAL)
    outcome = train(settings(digits, "tested", data__test=images, **WITH_ONNX), plugins=[networks.__name__])
    assert outcome.evaluations["test"].num_samples == NUM_TRAIN and outcome.evaluations["val"].num_samples == NUM_VAL
    assert not any(name.startswith("test/") for row in logged(outcome.folder) for name in row)
    assert tiny_run.result(outcome.folder)["test"]["loss"] == outcome.evaluations["test"].loss
    with KDDataLoader.from_config(settings(digits, "tested", teacher=None, data__test=images), "test") as loader:
        found = evaluate(OnnxRuntimeTeacher(outcome.folder / "exported" / "model.onnx"), loader)
    assert found.loss == pytest.approx(outcome.evaluations["test"].loss, rel=1e-5)
    assert (outcome.folder / "confusion_test.png").is_file()


def test_run_without_matplotlib_saves_no_plots(
    digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = train(settings(digits, "no plots"), plugins=[networks.__name__]).folder
    drawn = {path.name for path in folder.glob("*.png")}
    assert (folder / "result.json").is_file() and drawn == {"first_batch.png", "samples_val.png"}  # by Pillow
    (line,) = [line for line in caplog.messages if "no plots were saved" in line]
    assert "pip install 'kd_pipeline[train]'" in line
