"""`train` with objects of the user's: each ends with the weights of a plain loop, bit by bit, or is refused."""

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader, TensorDataset

from kd_pipeline.batch import KDBatch
from kd_pipeline.bench.tune import tune
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, DataError, StateError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.losses.settings import DistillSettings
from kd_pipeline.workflows._check import check
from kd_pipeline.workflows._compare import compare_files
from kd_pipeline.workflows._record import record
from kd_pipeline.workflows._train import train
from tests.workflows.objects import (
    LR,
    assert_same,
    batches,
    config,
    distillation_of,
    network,
    plain_loop,
    run,
    shuffled,
    teacher,
    tensors,
)

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def own_loss(outputs: Tensor, batch: KDBatch) -> Tensor:
    assert batch.labels is not None
    soft = kl_div(outputs.log_softmax(1), batch.teacher["logits"].softmax(1), reduction="batchmean")
    return cross_entropy(outputs, batch.labels) + soft


def task_loss(outputs: Tensor, batch: KDBatch) -> Tensor:
    assert batch.labels is not None
    return cross_entropy(outputs, batch.labels)


class Digits(lightning.LightningDataModule):
    """Made in `setup`, as those of a user are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def train_dataloader(self) -> "DataLoader[Any]":
        return shuffled()

    def val_dataloader(self) -> "DataLoader[Any]":
        return shuffled(32)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def test_student_teacher_and_a_list_of_batches(tmp_path: Path) -> None:
    student = network()
    run(tmp_path / "run", student=student)
    assert_same(student, plain_loop(batches))


def test_module_as_teacher_is_opened_for_the_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    student = network()
    run(tmp_path / "run", student=student, teacher=network(5))
    expected = plain_loop(batches)
    pairs = zip(student.parameters(), expected.parameters(), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in pairs)
    assert "teacher: " in caplog.text


def test_torch_loader(tmp_path: Path) -> None:
    student = network()
    run(tmp_path / "run", student=student, train_batches=shuffled())
    loader = shuffled()
    assert_same(student, plain_loop(lambda: loader))


def test_data_module(tmp_path: Path) -> None:
    student, data = network(), Digits()
    result = run(tmp_path / "run", {"epochs": 1}, student=student, train_batches=data)
    assert data.calls == ["prepare_data", "setup fit", "teardown fit"]
    assert result.evaluations["val"].num_samples == 32


def test_function_is_the_whole_loss(tmp_path: Path) -> None:
    student = network()
    run(tmp_path / "run", student=student, distillation=own_loss)
    assert_same(student, plain_loop(batches, loss=own_loss))


def test_function_needs_no_teacher(tmp_path: Path) -> None:
    student = network()
    run(tmp_path / "run", student=student, teacher=None, distillation=task_loss)
    assert_same(student, plain_loop(batches, loss=task_loss, with_teacher=False))


def test_built_distillation(tmp_path: Path) -> None:
    student = network()
    built = distillation_of(student, teacher(), distill_weight=0.25, temperature=2.0)
    run(tmp_path / "run", student=student, distillation=built)
    other = network()
    expected = distillation_of(other, teacher(), distill_weight=0.25, temperature=2.0)
    loop = plain_loop(batches, student=other, loss=lambda out, batch: expected(out, {}, batch, epoch=0, epochs=1).total)
    assert_same(student, loop)


def momentum(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


@pytest.mark.parametrize("kind", ["object", "function", "pair", "function of a pair"])
def test_optimizer(tmp_path: Path, kind: str) -> None:
    student = network()

    def pair(module: nn.Module) -> tuple[Any, Any]:
        optimizer = momentum(module)
        return optimizer, halved(optimizer)

    own: Any = {"object": momentum(student), "function": momentum, "pair": pair(student), "function of a pair": pair}
    run(tmp_path / "run", student=student, optimizer=own[kind])
    assert_same(student, plain_loop(batches, optimizer=momentum, scheduler=halved if "pair" in kind else None))


def test_baseline_trains_a_student_without_a_teacher(tmp_path: Path) -> None:
    student = network()
    settings = config(tmp_path / "run").model_copy(update={"stage": "baseline"})
    train(settings, student=student, train_batches=batches())
    assert_same(student, plain_loop(batches, with_teacher=False))


RECORDERS: list["Recorder"] = []


class Recorder(lightning.pytorch.callbacks.Callback):
    def __init__(self, folder: Path | str) -> None:
        self.folder, self.seen = Path(folder), []
        RECORDERS.append(self)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seen.append((trainer.current_epoch, (self.folder / "checkpoints" / "last.ckpt").exists()))


class Metrics(lightning.pytorch.loggers.Logger):
    """Keeps what it gets."""

    name, version = "mine", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.settings: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.settings = params


def test_callbacks_come_before_the_checkpoint_and_change_nothing(tmp_path: Path) -> None:
    student, recorder = network(), Recorder(tmp_path / "run")
    run(tmp_path / "run", student=student, callbacks=[recorder])
    assert recorder.seen == [(0, False), (1, True)]
    assert_same(student, plain_loop(batches))


def test_callbacks_of_the_config(tmp_path: Path) -> None:
    recorder = {"factory": f"{__name__}:Recorder", "kwargs": {"folder": str(tmp_path / "run")}}
    given: dict[str, Any] = {"student": network(), "teacher": teacher(), "train_batches": batches()}
    with pytest.raises(ConfigError, match=r"train\.callbacks\[0\]\.factory: .* allow it with --plugin"):
        train(config(tmp_path / "run", callbacks=[recorder]), **given)
    wrong = recorder | {"kwargs": {"place": "here"}}
    with pytest.raises(ConfigError, match=r"callbacks\[0\]\.factory: .*Recorder failed \(TypeError: .*'place'"):
        train(config(tmp_path / "run", callbacks=[wrong]), **given, plugins=[__name__])
    RECORDERS.clear()
    train(config(tmp_path / "run", callbacks=[recorder]), **given, plugins=[__name__])
    assert [each.seen for each in RECORDERS] == [[(0, False), (1, True)]]


def test_loggers_get_settings_metrics_and_the_result(tmp_path: Path) -> None:
    logger = Metrics()
    run(tmp_path / "run", loggers=[logger], validation=batches(32, start=100))
    assert logger.settings["train.epochs"] == 2
    assert {"train/loss", "val/top1", "final/val/top1"} <= {name for row in logger.rows for name in row}
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_validation_by_name_and_test_at_the_end(tmp_path: Path) -> None:
    sets = {"val": batches(32, start=100), "hard": batches(48, start=200), "test": batches(16, start=300)}
    result = run(tmp_path / "run", validation=sets)
    sizes = {name: found.num_samples for name, found in result.evaluations.items()}
    assert sizes == {"val": 32, "hard": 48, "test": 16}


def test_result_is_the_best_student_of_the_validation(tmp_path: Path) -> None:
    student = network()
    run(tmp_path / "run", {"epochs": 3}, student=student, validation=batches(64, start=100))
    best = torch.load(tmp_path / "run" / "checkpoints" / "best_student.pt", weights_only=True)
    assert all(torch.equal(best[name], tensor) for name, tensor in student.state_dict().items())


def test_student_has_the_weights_of_the_ema(tmp_path: Path) -> None:
    student = network()
    run(tmp_path / "run", {"ema": {"decay": 0.5}}, student=student)
    ema = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["ema"]["student"]
    assert all(torch.equal(ema[name], tensor) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"ema": {"decay": 0.5}}], ids=["best", "ema"])
def test_student_of_a_finished_run_has_its_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained, again = network(), network(9)
    for student in (trained, again):
        run(tmp_path / "run", settings, student=student, validation=batches(64, start=100))
    assert_same(trained, again)


def test_projectors_are_trained_by_a_function(tmp_path: Path) -> None:
    settings = config(tmp_path / "run").model_copy(update={"distill": WITH_PROJECTOR})
    train(settings, student=network(width=4), teacher=features(), train_batches=batches(), optimizer=momentum)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(name.startswith("distillation.projectors.0") for name in saved["state_dict"])
    assert len(saved["optimizer_states"][0]["state"]) == len(saved["optimizer_states"][0]["param_groups"][0]["params"])


WITH_PROJECTOR = DistillSettings.model_validate(
    {"features": [{"loss": "feature_mse", "student": "0", "teacher": "0", "projector": "conv"}]}
)


def features() -> Any:
    from kd_pipeline.teachers.open import open_teacher
    from kd_pipeline.teachers.settings import TeacherSettings

    settings = TeacherSettings(backend="pytorch", precision="fp32", features=("0",))
    return open_teacher(settings, module=network(5), image_shape=(3, 8, 8))


def test_optimizer_without_the_projectors_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path / "run").model_copy(update={"distill": WITH_PROJECTOR})
    student = network(width=4)
    with pytest.raises(ConfigError, match=r"does not train 'projectors\.0.* a projector that learns"):
        train(settings, student=student, teacher=features(), train_batches=batches(), optimizer=momentum(student))


def test_optimizer_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trains no parameter of the student"):
        run(tmp_path / "run", optimizer=momentum(network()))


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"student": "resnet18"}, r"student should be an nn\.Module.* got str 'resnet18'"),
        ({"teacher": "resnet50"}, "teacher should be a Teacher, an nn.Module, a Recording or settings.*got str"),
        ({"train_batches": 3}, "train_batches should be a loader or an iterable of batches.*got int"),
        ({"train_batches": "data"}, "train_batches should be a loader or an iterable of batches.*got str"),
        ({"train_batches": (each for each in batches())}, "train_batches can be iterated over once only.*generator"),
        ({"validation": iter(batches())}, "validation 'val' can be iterated over once only.*list_iterator"),
        ({"validation": {"a/b": batches()}}, "validation has a set 'a/b'"),
        ({"validation": {}}, "validation has no sets"),
        ({"distillation": 0.5}, "distillation should be a function or a callable object, got float 0.5"),
        ({"validate": "val"}, "validate should be a function or a callable object, got str"),
        ({"optimizer": "sgd"}, "optimizer should be a torch optimizer, a pair.*got str 'sgd'"),
        ({"optimizer": torch.optim.Adam}, r"optimizer is the class Adam; pass a function.*lambda module: Adam\("),
        ({"optimizer": lambda module: 1}, "optimizer should be a torch optimizer.*it is int"),
        ({"validation": [shuffled()]}, "validation 'val' is a list of loaders: name them"),
        ({"train_batches": [shuffled()]}, "train_batches is a list of loaders: chain their data sets"),
        ({"callbacks": lightning.Callback()}, "callbacks should be a list, got Callback"),
        ({"callbacks": [print]}, r"callbacks should be lightning\.pytorch\.callbacks\.Callback objects"),
        ({"loggers": 1}, "loggers should be a list, got int"),
        ({"loggers": ["csv"]}, r"loggers should be lightning\.pytorch\.loggers\.Logger objects, got str"),
    ],
)
def test_object_of_the_wrong_kind_is_refused(tmp_path: Path, objects: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", **objects)


@pytest.mark.parametrize("given", ["my.yaml", Path("my.yaml"), {"run_dir": "runs/mine"}])
def test_file_or_mapping_is_no_config(given: Any) -> None:
    advice = r"kd_pipeline\.Config\(" if isinstance(given, dict) else r"kd_pipeline\.load_config\('my.yaml'\)"
    for call in (train, record, check, KDDataLoader.from_config, tune, compare_files):
        with pytest.raises(ConfigError, match=f"config should be a Config, got .*{advice}"):
            call(given)


def test_loss_without_a_gradient_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="depends on no weight that is trained"):
        run(tmp_path / "run", distillation=lambda outputs, batch: outputs.detach().mean())


def test_labels_beyond_the_logits_are_named(tmp_path: Path) -> None:
    images, labels = tensors()
    with pytest.raises(DataError, match=r"the label of row .* and the student has 10 logits, for labels from 0 to 9"):
        run(tmp_path / "run", train_batches=[(images, labels + 5)])


def test_student_in_the_config_too_is_refused(tmp_path: Path) -> None:
    settings = Config.model_validate({"run_dir": tmp_path, "student": {"builtin": "small_resnet"}})
    with pytest.raises(ConfigError, match="two students: the argument student and student in the config"):
        train(settings, student=network(), teacher=teacher(), train_batches=batches())


def test_teacher_in_the_config_too_is_refused(tmp_path: Path) -> None:
    settings = Config.model_validate({"run_dir": tmp_path, "teacher": {"onnx": "teacher.onnx"}})
    with pytest.raises(ConfigError, match="two teachers"):
        train(settings, student=network(), teacher=teacher(), train_batches=batches())


def test_without_a_run_dir_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="a run needs a folder: set run_dir"):
        train(student=network(), teacher=teacher(), train_batches=batches())


def test_without_a_teacher_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stage: distill needs a teacher: pass teacher"):
        run(tmp_path / "run", teacher=None)


def test_without_batches_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.train, or in Python pass train_batches"):
        run(tmp_path / "run", train_batches=None)


@pytest.mark.parametrize("stage", ["teacher", "all"])
def test_stages_of_the_config_take_no_objects(tmp_path: Path, stage: str) -> None:
    settings = config(tmp_path / "run").model_copy(update={"stage": stage})
    with pytest.raises(ConfigError, match=f"stage: {stage} trains the network of teacher.model.*stage: baseline"):
        train(settings, student=network(), train_batches=batches())


def test_baseline_takes_no_teacher(tmp_path: Path) -> None:
    settings = config(tmp_path / "run").model_copy(update={"stage": "baseline"})
    with pytest.raises(ConfigError, match="baseline trains without a teacher"):
        train(settings, student=network(), teacher=teacher(), train_batches=batches())


def test_other_student_does_not_resume(tmp_path: Path) -> None:
    run(tmp_path / "run", {"epochs": 1})
    with pytest.raises(StateError, match=r"objects\.student\.tensors: fingerprint"):
        run(tmp_path / "run", student=network(width=16))


def shuffled_by_torch() -> "DataLoader[Any]":
    """In an order that is drawn from torch's random state."""
    return DataLoader(TensorDataset(*tensors()), batch_size=16, shuffle=True)


@pytest.mark.parametrize("source", [batches, shuffled_by_torch])
def test_run_that_resumes_after_an_epoch_ends_the_same(tmp_path: Path, source: Any) -> None:
    def scheduled(module: nn.Module) -> tuple[Any, Any]:
        optimizer = momentum(module)
        return optimizer, halved(optimizer)

    whole, begun, resumed = network(), network(), network(9)
    run(tmp_path / "whole", {"epochs": 3}, student=whole, train_batches=source(), optimizer=scheduled)
    run(tmp_path / "parts", {"epochs": 1}, student=begun, train_batches=source(), optimizer=scheduled)
    run(tmp_path / "parts", {"epochs": 3}, student=resumed, train_batches=source(), optimizer=scheduled)
    assert_same(whole, resumed)


def test_custom_distillation_of_the_wrong_shape_says_so(tmp_path: Path) -> None:
    def of_rows(outputs: Tensor, batch: KDBatch) -> Tensor:
        return outputs.mean(1)

    with pytest.raises(ConfigError, match=r"distillation: .*of_rows.* should return a scalar tensor, got \[16\]"):
        run(tmp_path / "run", distillation=of_rows)


def test_subclass_of_distillation_is_used(tmp_path: Path) -> None:
    class Doubled(Distillation):
        def distill_loss(self, *args: Any) -> Tensor:
            return 2 * super().distill_loss(*args)

    def built(student: nn.Module) -> Distillation:
        outputs = teacher().outputs
        return Doubled(
            DistillSettings(), student=student, teacher_outputs=outputs, image_shape=(3, 8, 8), num_classes=10
        )

    student, other = network(), network()
    run(tmp_path / "run", student=student, distillation=built(student))
    loss = built(other)
    loop = plain_loop(batches, student=other, loss=lambda out, batch: loss(out, {}, batch, epoch=0, epochs=1).total)
    assert_same(student, loop)
