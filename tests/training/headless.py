"""Runs of students without a head: a tiny vision transformer of timm as teacher, a tinier network as student."""

from pathlib import Path
from typing import Any

import timm
import torch

from kd_pipeline.config.config import Config
from kd_pipeline.workflows._train import TrainResult
from tests.training import tiny_run

TIMM = "vit_tiny_patch16_224"
KWARGS = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 12, "num_heads": 2}
STUDENT = {"builtin": "small_resnet", "num_classes": 0, "kwargs": {"width": 4}}
WITH_STATE = [
    {"loss": "cosine", "student": "pooled", "teacher": "pooled", "standardize": "phi_s"},
    {"loss": "am_radio", "student": "spatial", "teacher": "spatial", "standardize": "channels"},
    {"loss": "relational", "student": "pooled", "teacher": "pooled", "queue_size": 40},
]
"""Terms with statistics of the teacher and a queue, which are part of what a run resumes from."""


def settings(folder: Path, name: str, **changes: Any) -> Config:
    """A run of two epochs of six steps on images without labels, validated on labeled ones."""
    weights = folder / "vit.pt"
    if not weights.is_file():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            torch.save(timm.create_model(TIMM, num_classes=0, **KWARGS).state_dict(), weights)
    found = {
        "data__train": tiny_run.split(folder, "unlabeled", tiny_run.TRAIN),
        "teacher": {"model": {"timm": TIMM, "num_classes": 0, "kwargs": KWARGS, "checkpoint": weights}},
        "student": STUDENT,
        "feature_probe": {"bank": "val"},
    }
    return tiny_run.settings(folder, name, **(found | changes))


def run(folder: Path, name: str, **changes: Any) -> TrainResult:
    return tiny_run.train_without_plots(settings(folder, name, **changes))
