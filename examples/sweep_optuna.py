"""A sweep with Optuna: each trial is a run of `train` with overrides of one config, and returns its best metric."""

import os
import sys

import numpy as np
import optuna
from sklearn.datasets import load_digits

from kd_pipeline import load_config, train

CONFIG = """
data:
  batch_size: 16
  train: {source: {kind: arrays, images: train.npz}, transform: {preset: train, size: 8, area: [0.5, 1.0], flip: 0.0}}
  val: {source: {kind: arrays, images: val.npz}, transform: {preset: eval, size: 8, resize: 8}}
teacher: {model: {builtin: small_resnet, kwargs: {width: 8}}}
student: {builtin: small_resnet, kwargs: {width: 4}}
train: {epochs: 2, loggers: [csv], num_threads: 1, optimizer: {lr: 0.01}}
"""


def objective(trial: optuna.Trial) -> float:
    lr, temperature = trial.suggest_float("lr", 1e-3, 3e-2, log=True), trial.suggest_float("temperature", 1.0, 8.0)
    overrides = [f"run_dir=trial_{trial.number}", f"train.optimizer.lr={lr}", f"distill.temperature={temperature}"]
    overrides += ["teacher.model.checkpoint=teacher/teacher/exported/model.safetensors"]  # trained once, below
    return train(load_config("sweep.yaml", overrides)).evaluations["val"].top1 or 0.0


if __name__ == "__main__":
    os.chdir(sys.argv[1])  # a folder to write into
    digits = load_digits()
    for name, part in (("train", slice(0, 400)), ("val", slice(400, 600))):
        np.savez(name, images=(digits.images[part] * 15).astype(np.uint8), labels=digits.target[part])
    with open("sweep.yaml", "w") as file:
        file.write(CONFIG)
    train(load_config("sweep.yaml", ["run_dir=teacher", "stage=teacher"]))
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=int(sys.argv[2]))
    print(f"best: {study.best_value:.1%} with {study.best_params}")
