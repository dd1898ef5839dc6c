"""Training steps on a GPU, as far as torch can be asked without one: what they copy, and what they wait for."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

pytest.importorskip("lightning")

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.losses.distillation import Distillation, DistillSettings
from kd_pipeline.training.ema import EmaSettings, StudentEma
from kd_pipeline.training.epoch_loss import EpochLoss
from kd_pipeline.training.module import DistillModule
from kd_pipeline.training.nonfinite import StepGuard
from kd_pipeline.training.optimizers import OptimizerSettings, build_optimizer
from kd_pipeline.training.schedules import ScheduleSettings, build_schedule
from kd_pipeline.training.settings import TrainSettings
from tests.networks import NUM_CLASSES, ConvNet, PixelNet
from tests.on_gpu import DEVICE, OnGpu

ROWS, SHAPE = 4, (3, 16, 16)


class Trainer(SimpleNamespace):
    """What the module asks Lightning for in a step."""

    def __init__(self, **changes: Any) -> None:
        self.strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor, root_device=DEVICE)
        self.fit_loop = SimpleNamespace(batch_idx=1)
        self.precision_plugin, self.optimizers = None, []
        self.train_dataloader = SimpleNamespace(batch_size=ROWS, sample_name=str)
        self.current_epoch, self.global_step, self.num_training_batches = 0, 1, 10
        self.log_every_n_steps, self.world_size, self.is_last_batch = 50, 1, False
        super().__init__(**changes)


def build(*, of_pixels: bool = False, **settings: Any) -> tuple[DistillModule, Trainer]:
    """A module whose student is a classifier, or a network for segmentation."""
    student = PixelNet(NUM_CLASSES, output="logits") if of_pixels else ConvNet()
    shape = (NUM_CLASSES, *SHAPE[1:]) if of_pixels else (NUM_CLASSES,)
    distillation = Distillation(
        DistillSettings(),
        student=student,
        teacher_outputs={"logits": TensorSpec((None, *shape), torch.float32)},
        image_shape=SHAPE,
        num_classes=NUM_CLASSES,
    )
    module = DistillModule(
        student,
        distillation,
        TrainSettings.model_validate(settings),
        steps_per_epoch=10,
        teacher=None,
        identity={},
        validate=lambda model: {},
    )
    module.trainer = trainer = Trainer()
    return module, trainer


def move(gpu: OnGpu, module: DistillModule) -> torch.optim.Optimizer:
    """To the GPU, as Lightning does, and the optimizer that it makes then."""
    gpu.module(module)
    if module.ema is not None:
        gpu.module(module.ema.student)
    optimizer = build_optimizer(module.student, OptimizerSettings(name="sgd", momentum=0.9))
    module.trainer.optimizers = [optimizer]
    return optimizer


def batch_on(gpu: OnGpu, *, of_pixels: bool = False) -> KDBatch:
    shape = (NUM_CLASSES, *SHAPE[1:]) if of_pixels else (NUM_CLASSES,)

    def on_gpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return gpu.tensor(torch.zeros(size, dtype=dtype))

    return KDBatch(
        images=on_gpu(ROWS, *SHAPE),
        labels=None if of_pixels else on_gpu(ROWS, dtype=torch.int64),
        masks=on_gpu(ROWS, *SHAPE[1:], dtype=torch.int64) if of_pixels else None,
        index=on_gpu(ROWS, dtype=torch.int64),
        valid=on_gpu(ROWS, dtype=torch.bool),
        teacher={"logits": on_gpu(ROWS, *shape)},
    )


def give_gradients(module: nn.Module) -> None:
    """In place of the backward pass, of which such tensors have none."""
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)


@contextmanager
def values_of_the_one_wait(monkeypatch: pytest.MonkeyPatch, *values: float) -> Iterator[list[tuple[int, ...]]]:
    """Let the GPU's tensors have these values where they are read, and collect the shapes of what is read."""
    read: list[tuple[int, ...]] = []

    def tolist(tensor: Tensor) -> list[float]:
        read.append(tuple(tensor.shape))
        return list(values)

    with monkeypatch.context() as patch:
        patch.setattr(FakeTensor, "tolist", tolist)
        yield read


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema and norm": {"ema": {"decay": 0.9}, "log_gradient_norm": True, "clip": 1.0},
    "skipping": {"max_nonfinite_steps": 2},
    "accumulated": {"accumulate": 2},
}


@pytest.mark.parametrize("of_pixels", [False, True], ids=["images", "pixels"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_step_waits_once(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], of_pixels: bool) -> None:
    """For three numbers, before the optimizer's step, where nothing is logged; nothing is copied."""
    module, _trainer = build(of_pixels=of_pixels, **settings)
    with OnGpu() as gpu:
        optimizer = move(gpu, module)
        batch = batch_on(gpu, of_pixels=of_pixels)
        module.on_train_epoch_start()
        for number in range(module._settings.accumulate):
            loss = module.training_step(batch, number)
            assert loss.device == DEVICE
        give_gradients(module)
        with values_of_the_one_wait(monkeypatch, 0.0, 1.0, 2.0) as read:
            module.on_before_optimizer_step(optimizer)
            optimizer.step()
            if module.ema is not None:
                module.ema.update(module.network)
        module.on_train_batch_end(loss, batch, number)
        assert read == [(3,)]
        assert not gpu.copies
        assert module.progress.loss == 2.0


def test_norm_of_scaled_gradients_is_logged_unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an optimizer unscales them in its step, as torch's fused ones do; the scale is read if it is logged."""
    module, trainer = build(log_gradient_norm=True)
    scaler = mock.Mock(get_scale=mock.Mock(return_value=512.0))
    trainer.precision_plugin = SimpleNamespace(scaler=scaler)
    optimizer = build_optimizer(module.student, OptimizerSettings(name="sgd", kwargs={"fused": True}))
    logged = mock.Mock()
    monkeypatch.setattr(module, "log", logged)
    for is_logged in (False, True):
        module._is_logged = is_logged
        module._guard.watch(mock.Mock(terms=mock.Mock(total=torch.zeros(()))))
        for parameter in module.student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        module.student.head.bias.grad[0] = 1024.0
        module.on_before_optimizer_step(optimizer)
    assert [call.args for call in logged.call_args_list] == [("train/gradient_norm", 2.0)]
    assert scaler.get_scale.call_count == 1


def test_batch_without_a_step_is_waited_for() -> None:
    """While its samples are known; once more than in a run without accumulation."""
    module, _trainer = build(accumulate=4)
    with OnGpu() as gpu:
        move(gpu, module)
        module.training_step(batch_on(gpu), 0)
        with pytest.raises(DataDependentOutputException):
            module.on_after_backward()
        assert not gpu.copies


def test_buffers_of_a_skipped_step_are_restored_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = StepGuard(2, sample_name=str)
    with OnGpu() as gpu:
        network = gpu.module(ConvNet())
        guard.start_step(network.buffers())
        monkeypatch.setattr("kd_pipeline.training.nonfinite.first_nonfinite", lambda *given, **more: None)
        guard._skip(network, "the loss is not finite")
        assert guard.num_skipped == 1
        assert not gpu.copies


def test_metrics_of_an_epoch_are_counted_on_the_gpu() -> None:
    """The means are read at its end; what a checkpoint restored is copied there once."""
    module, trainer = build()
    with OnGpu() as gpu:
        move(gpu, module)
        for number in range(2):
            module.training_step(batch_on(gpu), number)
        assert [value.device for value in module._accuracy.of_epoch(trainer).values()] == [DEVICE]
        assert not gpu.copies
        with pytest.raises(DataDependentOutputException):
            module._epoch_loss.mean(trainer)
        restored = EpochLoss()
        restored.load([3.0, 4.0])
        restored.start_epoch()
        for _ in range(2):
            restored.add(gpu.tensor(torch.ones(())), gpu.tensor(torch.ones((), dtype=torch.int64)))
        assert [copy.shape for copy in gpu.copies] == [(2,)]


@pytest.mark.parametrize("warmup", [True, False, "exponential", "power"])
def test_average_is_updated_on_the_gpu(warmup: Any) -> None:
    student = ConvNet().half()
    ema = StudentEma(student, EmaSettings(decay=0.9, warmup=warmup))
    with OnGpu() as gpu:
        gpu.module(student)
        gpu.module(ema.student)
        for _ in range(2):
            ema.update(student)
        assert {tensor.device for tensor in ema.student.state_dict().values()} == {DEVICE}
        assert not gpu.copies


OPTIMIZERS = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adamw": {},
    "adamw foreach": {"kwargs": {"foreach": True}},
    "rmsprop": {"momentum": 0.9},
    "torch.optim.RAdam": {},
    "lion": {},
    "lamb": {},
}


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS.items(), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_optimizer_steps_without_waiting(name: str, options: dict[str, Any], kind: Any) -> None:
    """Learning rates are numbers on the host, which a step needs there."""
    if name in ("lion", "lamb"):
        pytest.importorskip("timm")
    milestones = {"milestones": (1.0,)} if kind == "step" else {}
    network = ConvNet()
    with OnGpu() as gpu:
        gpu.module(network)
        optimizer = build_optimizer(network, OptimizerSettings.model_validate({"name": name.split()[0], **options}))
        schedule = build_schedule(optimizer, ScheduleSettings(kind=kind, **milestones), epochs=2, steps_per_epoch=2)
        for _ in range(3):
            give_gradients(network)
            optimizer.step()
            schedule.step()
        assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)
        assert not gpu.copies
