"""Runs of `kd-pipeline train` as a command, small enough to be started many times: a tiny teacher, a tinier student."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from tests.forks import Command, free_port, torchrun_variables

CONFIG = """
seed: 3
run_dir: runs/tiny
data:
  batch_size: 32
  train:
    source: {kind: arrays, images: train.npz}
    transform: {preset: train, size: 16, area: [0.5, 1.0], flip: 0.0}
  val:
    source: {kind: arrays, images: val.npz}
    transform: {preset: eval, size: 16, resize: 16}
teacher: {model: {builtin: small_resnet, kwargs: {width: 8}}}
student: {builtin: small_resnet, kwargs: {width: 4}}
train: {epochs: 2, optimizer: {lr: 1.0e-2}, log_every_steps: 2, save_every_steps: 3, loggers: [csv]}
"""

NO_ONNX = "train.export.onnx=false"
"""For a test of something else: the export takes longer than the training."""


def write_data(folder: Path) -> None:
    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    images = images.repeat(2, 1).repeat(2, 2)
    np.savez(folder / "train.npz", images=images[:330], labels=digits.target[:330])
    np.savez(folder / "val.npz", images=images[330:400], labels=digits.target[330:400])


def start(folder: Path, *arguments: str) -> Command:
    """Start `kd-pipeline train -c tiny.yaml ...` in `folder`."""
    return Command(["train", "-c", "tiny.yaml", *arguments], folder)


def start_ranks(folder: Path, *arguments: str) -> list[Command]:
    """Start two processes that train together, with the variables that torchrun sets."""
    command, port = ["train", "-c", "tiny.yaml", *arguments], free_port()
    return [Command(command, folder, {**os.environ, **torchrun_variables(rank, 2, port=port)}) for rank in range(2)]


def start_torchrun(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start `torchrun --nproc-per-node 2 -m kd_pipeline train -c tiny.yaml ...` in `folder`."""
    torchrun = ["torch.distributed.run", "--log-dir", "torchrun", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, "-m", "kd_pipeline", "train", "-c", "tiny.yaml", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "Command | subprocess.Popen[str]") -> tuple[int | None, str]:
    """Wait for the exit status and the output."""
    output, error = process.communicate(timeout=300)
    return process.returncode, output + error
