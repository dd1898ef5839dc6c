"""A run by its config, with images whose size changes and an op of the user's own, and recordings of such images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.data.size_schedule import RandomSize
from kd_pipeline.errors import ConfigError
from kd_pipeline.onnx.file import read_onnx
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.workflows._record import record
from kd_pipeline.workflows._train import train
from tests import runs
from tests.workflows.objects import StopBefore, Stopped

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::lightning")]

PLUGINS = ["tests.own_ops"]
CHOICES = "{choices: [12, [16, 20]]}"


class Seen(Callback):
    """The sizes of the batches that a student was trained on."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: KDBatch, number: int) -> None:
        self.sizes.append(tuple(batch.images.shape[2:]))


def config_of(folder: Path, size: str, *overrides: str) -> Config:
    if not (folder / "train.npz").exists():
        runs.write_data(folder)
        (folder / "tiny.yaml").write_text(runs.CONFIG, encoding="utf-8")
    settings = [
        f"data.train.transform.size={size}",
        "data.train.transform.order=[{factory: 'tests.own_ops:shift', num_draws: 1}]",
        "teacher.model.pretrained=false",
        "probe=null",
        "data.device=cpu",
        f"run_dir={folder / 'run'}",
        *(f"data.{split}.source.images={folder / split}.npz" for split in ("train", "val")),
    ]
    return load_config(folder / "tiny.yaml", [*settings, *overrides])


def weights(config: Config) -> dict[str, torch.Tensor]:
    assert config.run_dir is not None
    found: dict[str, torch.Tensor] = load_checkpoint(config.run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    return found


def test_run_stopped_within_an_epoch_ends_the_same(tmp_path: Path) -> None:
    seen = Seen()
    whole = config_of(tmp_path, CHOICES, runs.NO_ONNX)
    train(whole, callbacks=[seen], plugins=PLUGINS)
    schedule = RandomSize(choices=(12, (16, 20)))
    numbers = np.arange(10)
    assert seen.sizes == [
        size for epoch in (0, 1) for size in schedule.at("images", seed=3, epoch=epoch, number=numbers)
    ]
    assert len(set(seen.sizes)) == 2

    parts = config_of(tmp_path, CHOICES, runs.NO_ONNX, f"run_dir={tmp_path / 'parts'}")
    with pytest.raises(Stopped):
        train(parts, callbacks=[StopBefore(14)], plugins=PLUGINS)
    resumed = Seen()
    train(parts, callbacks=[resumed], plugins=PLUGINS)
    assert resumed.sizes == seen.sizes[12:]  # the last checkpoint is that of step 12
    for name, tensor in weights(whole).items():
        assert tensor.equal(weights(parts)[name]), name


def test_progressive_run_is_exported_for_its_end(tmp_path: Path) -> None:
    seen = Seen()
    config = config_of(tmp_path, "{start: 12, end: 16, epochs: 2, step: 4}")
    result = train(config, callbacks=[seen], plugins=PLUGINS)
    assert seen.sizes == [(12, 12)] * 10 + [(16, 16)] * 10
    assert result.evaluations["val"].top1 is not None
    (exported,) = (tmp_path / "run").rglob("*.onnx")
    assert read_onnx(exported).images.shape[1:] == (3, 16, 16)


def test_student_of_one_size_is_refused_before_the_first_step(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 20, 10))
    with pytest.raises(ConfigError, match=r"the student Sequential fails on zeros \[2, 3, 12, 12\]"):
        train(config_of(tmp_path, CHOICES, "student=null"), student=student, plugins=PLUGINS)


def test_teacher_of_one_size_is_recorded_beside_sizes_that_change(tmp_path: Path) -> None:
    """With batches of another size, so the student sees other sizes than while the teacher was recorded."""
    view = [f"data.{split}.views={{teacher: {{follow: images, size: 16}}}}" for split in ("train", "val")]
    view += ["data.train.transform.erase=0.5"]
    order = "data.train.transform.order=[erase, {factory: 'tests.own_ops:shift', num_draws: 1}]"
    recorded = config_of(tmp_path, CHOICES, runs.NO_ONNX, *view, order, "teacher.view=teacher")
    record(recorded, plugins=PLUGINS)
    # All images of an epoch are compared with those that were recorded.
    replayed = f"teacher={{backend: recorded, path: {tmp_path / 'run' / 'recording'}, verify: 330}}"
    seen, changes = Seen(), (runs.NO_ONNX, *view, order, "data.batch_size=16", replayed)
    train(config_of(tmp_path, CHOICES, *changes), callbacks=[seen], plugins=PLUGINS)
    assert len(set(seen.sizes)) == 2
    blurred = (
        "data.train.transform.blur=0.5",
        order.replace("erase", "erase, blur"),
        f"run_dir={tmp_path / 'blurred'}",
    )
    with pytest.raises(ConfigError, match=r"the teacher's view teacher\..* without auto_augment, blur and mix"):
        record(config_of(tmp_path, CHOICES, *view, *blurred, "teacher.view=teacher"), plugins=PLUGINS)


def test_recording_needs_sizes_that_no_batch_decides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"changes from batch to batch.* per: epoch; or"):
        record(config_of(tmp_path, CHOICES), plugins=PLUGINS)
    recorded = config_of(tmp_path, "{choices: [12, 16], per: epoch}", runs.NO_ONNX)
    record(recorded, plugins=PLUGINS)
    seen, overrides = Seen(), (f"teacher={{backend: recorded, path: {tmp_path / 'run' / 'recording'}}}",)
    train(
        config_of(tmp_path, "{choices: [12, 16], per: epoch}", runs.NO_ONNX, "data.batch_size=16", *overrides),
        callbacks=[seen],
        plugins=PLUGINS,
    )
    assert len(seen.sizes) == 40
