"""Recordings of a small teacher on photographs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.recorded.manifest import RecordingManifest
from kd_pipeline.workflows import _record
from kd_pipeline.workflows._record import RecordSettings, record
from kd_pipeline.workflows.teacher import open_run_teacher
from tests.networks import ConvNet
from tests.streams import TRAIN, Fields, run

NUM_EPOCHS = 2
PLUGINS = [__name__]
TOP_2 = {"logits": {"shape": [3], "top_k": 2}}
"""Outputs of a manifest, for `small_recording`."""
INT8 = {"spatial": {"shape": [2, 3], "dtype": "int8", "num_prefix_tokens": 1}}
GOOD: dict[str, Any] = {
    "version": 1,
    "teacher": {"fingerprint": "f", "backend": "pytorch", "precision": "fp32", "classes": ["a", "b", "c"]},
    "outputs": {"logits": {"shape": [3]}},
    "stream": {"seed": 5, "transform": {"mean": [0.5, 0.5, 0.5], "auto_augment": {"kind": "rand_augment"}}},
    "num_rows": 40,
    "epochs": 1,
    "epochs_done": 1,
}
"""The manifest of `small_recording`."""


def net(num_classes: int = 3) -> nn.Module:
    """A network with three logits and a feature map."""
    found = ConvNet()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found.head = nn.Linear(32, num_classes)
    return found


def other_net() -> nn.Module:
    """The same network with different weights."""
    found = net()
    with torch.no_grad():
        found.head.bias += 1
    return found


def commit_often() -> None:
    """Let a process lose 20 ms of its work at most, if it is killed."""
    _record._COMMIT_INTERVAL_S = 0.02


def config(root: Path, **changes: Any) -> Config:
    """A teacher on the photographs in `root`; `changes` replace keys of `data`, of `data.train` or of the config."""
    split = {"source": {"kind": "image_folder", "root": root}, "transform": TRAIN.model_dump(), "last_batch": "keep"}
    data: dict[str, Any] = {"batch_size": 8, "num_threads": 1, "device": "cpu"}
    found: dict[str, Any] = {
        "seed": 5,
        "teacher": {"model": {"factory": f"{__name__}:net"}},
        "train": {"epochs": NUM_EPOCHS},
    }
    for name, value in changes.items():
        if name in ("source", "transform", "mix", "repeats", "shuffle", "last_batch"):
            split[name] = value
        elif name in ("batch_size", "on_bad_sample", "max_bad_fraction", "max_pixels", "hw_decoder_load"):
            data[name] = value
        else:
            found[name] = value
    return Config.model_validate({**found, "data": {**data, "train": split}})


def recorded(root: Path, out: Path, *, kept: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """Record the config into `out`."""
    return record(config(root, **changes), RecordSettings(out=out, **(kept or {})), plugins=PLUGINS)


def live(root: Path, num_epochs: int = NUM_EPOCHS, **changes: Any) -> list[Fields]:
    """Batches with the outputs of the live teacher."""
    described = config(root, **changes)
    teacher = open_run_teacher(described, plugins=PLUGINS)
    with KDDataLoader.from_config(described, teacher=teacher) as loader:
        return run(loader, num_epochs)


def replaying(
    root: Path, recording: Path, *, shard: Shard | None = None, verify: int = 5, **changes: Any
) -> KDDataLoader:
    """A loader that replays a recording."""
    return KDDataLoader.from_config(config(root, teacher={"path": recording, "verify": verify}, **changes), shard=shard)


def replayed(root: Path, recording: Path, num_epochs: int = NUM_EPOCHS, **options: Any) -> list[Fields]:
    """Batches with the outputs of a recording."""
    with replaying(root, recording, **options) as loader:
        return run(loader, num_epochs)


def edit(recording: Path, **changes: Any) -> None:
    """Change values in the manifest; `stream__dali="1"` changes a nested one."""
    manifest = RecordingManifest.load(recording)
    stream = dict(manifest.stream)
    for name in [name for name in changes if name.startswith("stream__")]:
        stream[name.removeprefix("stream__")] = changes.pop(name)
    manifest.model_copy(update={**changes, "stream": stream}).save(recording)


def small_recording(folder: Path, **changes: Any) -> Path:
    """A recording of 40 images made by hand, with sample k at position k; `changes` are of the manifest."""
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(GOOD | changes))
    np.arange(1, 41, dtype="<i4").tofile(folder / "sample.bin")
    np.zeros(40, "<u4").tofile(folder / "checksum.bin")
    np.arange(120, dtype="<f4").tofile(folder / "logits.values.bin")
    np.zeros(80, "<i2").tofile(folder / "logits.classes.bin")
    np.zeros(40, "<f4").tofile(folder / "logits.rest.bin")
    np.arange(240, dtype="i1").tofile(folder / "spatial.values.bin")
    np.ones(80, "<f4").tofile(folder / "spatial.scale.bin")
    return folder
