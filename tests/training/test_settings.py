"""Every setting of a run does what it says: each law here fails if the setting does nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd_pipeline import losses
from kd_pipeline.errors import ConfigError
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.onnxruntime import OnnxRuntimeTeacher
from kd_pipeline.training.checkpoint import load_checkpoint
from tests.training import nets
from tests.training.nets import NUM_TRAIN, NUM_VAL, Weights, distance, logged, run, settings, weights

# Lightning has advice on workers, loggers and the trainer's options, none of which is about settings.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

ONE_STEP: dict[str, Any] = {"train__epochs": 1, "train__limit_train_batches": 1}
LR = 0.05


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and an untaught teacher."""
    folder = tmp_path_factory.mktemp("digits")
    nets.write_digits(folder)
    return folder


@pytest.fixture(scope="module")
def usual(digits: Path) -> Path:
    """A run with the settings as they are; do not change it."""
    return run(digits, "usual").folder


def begun(network: Callable[[], nn.Module]) -> nn.Module:
    """The network as a run with the seed 3 begins with it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return network()


@pytest.fixture
def start() -> Weights:
    """What a student begins with."""
    return begun(nets.plain).state_dict()


def test_two_batches_of_eight_with_their_gradients_added_are_a_batch_of_sixteen(digits: Path, usual: Path) -> None:
    found = run(digits, "accumulate", data__batch_size=8, train__accumulate=2).folder
    # Sums of 16 gradients in another order: some units in the last place of weights below 1.
    assert distance(weights(found), weights(usual)) < 1e-6
    assert [row["step"] for row in logged(found)] == [row["step"] for row in logged(usual)]
    alone = run(digits, "halves", data__batch_size=8).folder
    assert distance(weights(alone), weights(usual)) > 1e-3


def test_the_gradient_is_clipped_and_its_norm_logged_as_it_was_before(digits: Path, start: Weights) -> None:
    free = run(digits, "free", **ONE_STEP, train__log_gradient_norm=True).folder
    (row, *_) = logged(free)
    norm = row["train/gradient_norm"]
    assert distance(weights(free), start) == pytest.approx(LR * norm, rel=1e-4)
    clipped = run(digits, "clipped", **ONE_STEP, train__log_gradient_norm=True, train__clip=norm / 4).folder
    assert distance(weights(clipped), start) == pytest.approx(LR * norm / 4, rel=1e-4)
    assert logged(clipped)[0]["train/gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_gradient_norm_is_logged_only_where_it_is_wanted(usual: Path) -> None:
    assert not any("train/gradient_norm" in row for row in logged(usual))


def test_limits_end_each_epoch_and_each_validation_after_so_many_batches(digits: Path) -> None:
    found = run(digits, "limits", train__limit_train_batches=2, train__limit_val_batches=1).folder
    assert load_checkpoint(found / "checkpoints" / "last.ckpt")["global_step"] == 2 * 2
    assert [row["epoch"] for row in logged(found)] == [0, 0, 1, 1]
    assert nets.result(found)["val"]["num_samples"] == 16


def test_a_run_of_epochs_with_a_limit_goes_on_as_if_it_had_not_been_stopped(digits: Path) -> None:
    whole = run(digits, "at once", train__limit_train_batches=2).folder
    run(digits, "later", train__limit_train_batches=2, train__epochs=1)
    later = run(digits, "later", train__limit_train_batches=2).folder
    assert distance(weights(later), weights(whole)) == 0


def test_a_run_stops_early_when_nothing_gets_better_and_the_same_command_does_nothing_more(digits: Path) -> None:
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


def test_stopping_early_goes_by_the_figure_and_the_direction_that_it_is_given(digits: Path) -> None:
    for mode, last_epoch in (("max", 1), ("min", 3)):
        stopping = {"metric": "val/loss", "mode": mode, "patience": 1}
        found = run(digits, mode, stage="baseline", train__epochs=4, train__early_stopping=stopping).folder
        losses_of_epochs = [row["val/loss"] for row in logged(found) if "val/loss" in row]
        assert losses_of_epochs == sorted(losses_of_epochs, reverse=True)
        assert load_checkpoint(found / "checkpoints" / "last.ckpt")["epoch"] == last_epoch


def test_stopping_early_by_a_figure_that_nobody_measures_is_refused_with_those_there_are(digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping\.metric: .*'val/top3'.*val/top5"):
        run(digits, "nowhere", **ONE_STEP, train__early_stopping={"metric": "val/top3"})


def test_deterministic_refuses_operations_that_are_not(digits: Path) -> None:
    put = {"factory": "tests.training.nets:putting"}
    run(digits, "free put", **ONE_STEP, student=put)
    with pytest.raises(ConfigError, match="put_ does not have a deterministic implementation"):
        run(digits, "put", **ONE_STEP, student=put, train__deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("precision", "computed", "kept"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_student_computes_in_the_precision_and_is_exported_in_float32(
    digits: Path, precision: str, computed: torch.dtype, kept: torch.dtype
) -> None:
    nets.computed_in.clear()
    found = run(
        digits, precision, student={"factory": "tests.training.nets:watched"}, train__precision=precision
    ).folder
    assert nets.computed_in == {computed}
    state = load_checkpoint(found / "checkpoints" / "last.ckpt")["state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {kept}
    exported = load_file(found / "exported" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}


def test_a_compiled_student_learns_the_same_goes_on_exactly_and_is_exported_without_a_prefix(
    digits: Path, usual: Path
) -> None:
    torch._dynamo.utils.counters.clear()
    whole = run(digits, "compiled", train__compile=True).folder
    assert distance(weights(whole), weights(usual)) < 1e-5
    assert torch._dynamo.utils.counters["inductor"]
    run(digits, "compiled again", train__compile=True, train__epochs=1)
    again = run(digits, "compiled again", train__compile=True).folder
    assert distance(weights(again), weights(whole)) == 0
    for folder in (whole, again):
        exported = load_file(folder / "exported" / "model.safetensors")
        assert exported.keys() == nets.plain().state_dict().keys()
        checkpoint = load_checkpoint(folder / "checkpoints" / "last.ckpt")
        assert not any("_orig_mod" in name for name in checkpoint["state_dict"])


def test_a_baseline_is_the_student_alone_with_the_labels_and_asks_for_no_teacher(digits: Path, usual: Path) -> None:
    outcome = run(digits, "both", stage="baseline", teacher={"onnx": digits / "nowhere.onnx"})
    assert outcome.folder == digits / "both" / "baseline"
    rows = logged(outcome.folder)
    assert all(row["train/loss"] == row["train/task"] and row["train/task_weight"] == 1 for row in rows)
    assert not any(name.endswith(("distill", "teacher_share")) for row in rows for name in row)
    assert rows[0]["train/task"] == logged(usual)[0]["train/task"]  # the same beginning, the same images
    assert (outcome.folder / "exported" / "model.onnx").is_file()


UNLABELED: dict[str, Any] = {
    "distill": {"distill_weight": 1.0, "task_weight": 0.0},
    "probe": {"num_samples": 32, "strict": True},
}


def test_images_without_labels_teach_by_the_teacher_alone(digits: Path, start: Weights) -> None:
    bare = nets.split(digits, "unlabeled", nets.TRAIN)
    with_val = run(digits, "unlabeled", **UNLABELED, data__train=bare)
    without = run(digits, "unlabeled, no val", **UNLABELED, data__train=bare, data__val=None)
    labeled = run(digits, "labels not used", distill=UNLABELED["distill"])
    assert distance(weights(with_val.folder), start) > 1e-3
    assert distance(weights(with_val.folder), weights(without.folder)) == 0
    assert distance(weights(with_val.folder), weights(labeled.folder)) == 0
    top1 = with_val.figures["val"].top1
    assert top1 is not None and not without.figures
    for folder in (with_val.folder, without.folder):
        assert not any("train/top1" in row or "train/task" in row for row in logged(folder))
        assert (folder / "exported" / "model.onnx").is_file()


def test_validation_images_may_have_no_labels_either(digits: Path) -> None:
    outcome = run(
        digits,
        "val unlabeled",
        data__val=nets.split(digits, "unlabeled", nets.EVAL),
        train__compare_with_teacher=True,
        train__select_by="val/agreement",
    )
    assert outcome.figures["val"].top1 is None
    assert outcome.figures["val"].agreement is not None


def test_the_moving_average_of_a_teacher_is_what_teaches(digits: Path) -> None:
    teacher = {"model": {"factory": "tests.training.nets:normed"}, "backend": "pytorch"}
    average = {"stage": "teacher", "teacher": teacher, "train__ema": {"decay": 0.5, "warmup": False}}
    taught = run(digits, "ema", **average, data__val=None).folder
    checkpoint = load_checkpoint(taught / "checkpoints" / "last.ckpt")
    weights_file = taught / "exported" / "model.safetensors"
    exported = load_file(weights_file)
    for name, tensor in exported.items():
        assert torch.equal(tensor, checkpoint["ema"]["student"][name])
    assert not torch.equal(exported["4.weight"], checkpoint["state_dict"]["student.4.weight"])
    found = logged(run(digits, "ema", teacher=teacher).folder)[0]["train/distill"]
    with KDDataLoader.from_config(settings(digits, "ema", teacher=None), "train") as loader:
        images = next(iter(loader)).images
    net = nets.normed()
    net.load_state_dict(exported)
    wanted = losses.soft_target(begun(nets.plain)(images), net.eval()(images), temperature=4.0)
    assert found == pytest.approx(wanted.item(), rel=1e-5)


def test_the_test_images_are_looked_at_once_at_the_end_by_the_best_student(digits: Path) -> None:
    images = nets.split(digits, "train", nets.EVAL)
    outcome = run(digits, "tested", data__test=images)
    assert outcome.figures["test"].num_samples == NUM_TRAIN and outcome.figures["val"].num_samples == NUM_VAL
    assert not any(name.startswith("test/") for row in logged(outcome.folder) for name in row)
    assert nets.result(outcome.folder)["test"]["loss"] == outcome.figures["test"].loss
    with KDDataLoader.from_config(settings(digits, "tested", teacher=None, data__test=images), "test") as loader:
        found = evaluate(OnnxRuntimeTeacher(outcome.folder / "exported" / "model.onnx"), loader)
    assert found.loss == pytest.approx(outcome.figures["test"].loss, rel=1e-5)
    assert (outcome.folder / "confusion_test.png").is_file()
