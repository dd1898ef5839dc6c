"""A student sharded by FSDP is trained, saved, resumed and exported like a replicated one."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_pipeline.models.resnet import small_resnet
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.training.sharding import _blocks, full_state_dict, full_tensor, is_sharded
from tests.runs import NO_ONNX, finish, start_ranks

RUN = Path("runs/tiny")
OPTIONS = (
    "data.batch_size=16",
    "teacher.backend=pytorch",
    'teacher.features=["4"]',
    'distill.features=[{loss: feature_mse, student: "4", teacher: "4", weight: 0.1, projector: conv}, '
    "{loss: relational, student: logits, teacher: logits, weight: 0.1, queue_size: 24}]",
    "train.ema={decay: 0.9}",
    "train.clip=1.0",
    "train.log_gradient_norm=true",
)


def assert_close(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Up to the last digits: the norm over all parameters is summed in a different order."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def finish_ranks(folder: Path, *arguments: str) -> None:
    for status, output in map(finish, start_ranks(folder, *arguments)):
        assert status == 0, output


@pytest.mark.slow
def test_fsdp_matches_ddp_and_resumes(trained_teacher: Path, tmp_path: Path) -> None:
    for name in ("ddp", "fsdp", "killed"):
        shutil.copytree(trained_teacher, tmp_path / name)
    for strategy in ("ddp", "fsdp"):
        fast = [] if strategy == "fsdp" else [NO_ONNX]
        finish_ranks(tmp_path / strategy, *OPTIONS, f"train.strategy={strategy}", *fast)
    ddp, fsdp = (load_checkpoint(tmp_path / name / RUN / "checkpoints" / "last.ckpt") for name in ("ddp", "fsdp"))
    for part in ("projectors", "queue"):
        assert any(part in name for name in fsdp["state_dict"]), part
    assert_close(fsdp["state_dict"], ddp["state_dict"])
    assert_close(fsdp["ema"]["student"], ddp["ema"]["student"])
    assert fsdp["optimizer_states"][0]["state"].keys() == ddp["optimizer_states"][0]["state"].keys()
    for name in ("model.safetensors", "model.onnx", "model.json"):
        assert (tmp_path / "fsdp" / RUN / "exported" / name).is_file()

    processes = start_ranks(tmp_path / "killed", *OPTIONS, "train.strategy=fsdp", NO_ONNX)
    last = tmp_path / "killed" / RUN / "checkpoints" / "last.ckpt"
    while all(process.poll() is None for process in processes) and not last.exists():
        time.sleep(0.02)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert load_checkpoint(last)["global_step"] < 20
    finish_ranks(tmp_path / "killed", *OPTIONS, "train.strategy=fsdp", NO_ONNX)
    killed = load_checkpoint(last)
    for name, tensor in fsdp["state_dict"].items():
        assert torch.equal(tensor, killed["state_dict"][name]), name


@pytest.mark.slow
def test_fsdp_exports_full_best_student(trained_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_teacher, tmp_path / "work")
    arguments = ("data.batch_size=16", "train.strategy=fsdp", "train.epochs=1", NO_ONNX)
    finish_ranks(tmp_path / "work", *arguments)
    folder = tmp_path / "work" / RUN
    best = torch.load(folder / "checkpoints" / "best_student.pt", weights_only=True)
    last = load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    for name, tensor in load_file(folder / "exported" / "model.safetensors").items():
        assert torch.equal(tensor, best[name]) and torch.equal(tensor, last[f"student.{name}"]), name


def test_blocks() -> None:
    net = small_resnet(10, width=4)
    assert list(_blocks(net)) == [net[3], net[4], net[5]]
    assert list(_blocks(nn.ModuleList([nn.ModuleList([net]), nn.Sequential(nn.ReLU())]))) == [*net[3:6], net]


def test_unsharded_module() -> None:
    net = small_resnet(10, width=4)
    assert not is_sharded(net)
    assert full_tensor(net[0].weight) is net[0].weight
    assert full_state_dict(net).keys() == net.state_dict().keys()


@pytest.mark.parametrize(("name", "value"), [("compile", True), ("channels_last", True), ("precision", "16-mixed")])
def test_settings_that_need_ddp(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: {str(value).lower()} needs strategy: ddp"):
        TrainSettings.model_validate({"strategy": "fsdp", name: value})
