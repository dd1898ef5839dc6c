"""Recordings of a small teacher on photographs."""

import json
import math
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.recorded.folder import LocalFolder
from kd_pipeline.teachers.recorded.manifest import MANIFEST, RecordingManifest
from kd_pipeline.teachers.recorded.parts import Part, PartRows, column_offsets
from kd_pipeline.teachers.recorded.reader import RecordingReader
from kd_pipeline.teachers.recorded.writer import RecordingWriter
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
    "part_rows": 25,
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


def record_often() -> None:
    """Write parts of two batches of 16, and let a process lose 20 ms of its work at most, if it is killed."""
    _record._MAX_PART_ROWS, _record._COMMIT_INTERVAL_S = 32, 0.02


def record_a_little() -> None:
    """As `record_often`, but after four batches wait until the working directory has a file called `go`.

    So whoever kills the process finds something left to record, however slow the machine is.
    """
    record_often()
    write, written = RecordingWriter.write, count(1)

    def write_and_wait(writer: RecordingWriter, *arguments: Any) -> None:
        write(writer, *arguments)
        time.sleep(0.02)  # and commit
        while next(written) >= 4 and not Path("go").exists():
            time.sleep(0.01)

    RecordingWriter.write = write_and_wait  # type: ignore[method-assign]


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


def manifest_of(recording: Path) -> RecordingManifest:
    return LocalFolder(recording).load_manifest()


def num_epochs_of(recording: Path) -> int:
    """Complete epochs."""
    return LocalFolder(recording).find_parts(manifest_of(recording)).num_epochs


def column(recording: Path, name: str) -> NDArray[Any]:
    """A column `[num_epochs, num_rows, ...]` of all complete epochs."""
    manifest = manifest_of(recording)
    parts = LocalFolder(recording).find_parts(manifest)
    reader = RecordingReader(LocalFolder(recording), manifest, parts)
    position = np.arange(manifest.num_rows)
    epochs = [reader.read(name, epoch, position) for epoch in range(parts.num_epochs)]
    reader.close()
    return np.stack(epochs)


def set_column(recording: Path, name: str, values: NDArray[Any]) -> None:
    """Write a column of all complete epochs into the parts, whose names keep the digests of what they were."""
    manifest = manifest_of(recording)
    parts = LocalFolder(recording).find_parts(manifest)
    values = values.astype(manifest.columns[name].dtype)
    for part in parts.in_order:
        if part.epoch < parts.num_epochs:
            stop = manifest.part_stop(part.start)
            with (recording / part.name).open("r+b") as file:
                file.seek(column_offsets(manifest, stop - part.start)[name])
                file.write(values[part.epoch, part.start : stop].tobytes())


def files_of(recording: Path) -> dict[str, bytes]:
    """All files by name; temporary ones too."""
    paths = (path for path in recording.rglob("*") if path.is_file())
    return {str(path.relative_to(recording)): path.read_bytes() for path in paths}


def assert_same_files(first: Path, second: Path) -> None:
    """Raise AssertionError, which names the files that only one has, or that differ."""
    ours, theirs = files_of(first), files_of(second)
    alone = sorted(ours.keys() ^ theirs.keys())
    differing = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    assert not alone and not differing, f"{first} and {second}: only one has {alone}, and {differing} differ"


def part_of(recording: Path, epoch: int = 0, start: int = 0) -> Path:
    """The file of a part."""
    part = LocalFolder(recording).find_parts(manifest_of(recording)).find(epoch, start)
    assert part is not None
    return recording / part.name


def edit(recording: Path, **changes: Any) -> None:
    """Change values in the manifest; `stream__dali="1"` changes a nested one."""
    manifest = manifest_of(recording)
    stream = dict(manifest.stream)
    for name in [name for name in changes if name.startswith("stream__")]:
        stream[name.removeprefix("stream__")] = changes.pop(name)
    (recording / MANIFEST).write_bytes(manifest.model_copy(update={**changes, "stream": stream}).content)


def small_recording(folder: Path, **changes: Any) -> Path:
    """A recording of 40 images made by hand, with sample k at position k; `changes` are of the manifest."""
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps(GOOD | changes))
    manifest = manifest_of(folder)
    columns: dict[str, NDArray[Any]] = {
        "sample": np.arange(1, 41),
        "logits.values": np.arange(120),
        "spatial.values": np.arange(240),
        "spatial.scale": np.ones(80),
    }
    for start in manifest.part_starts:
        rows = PartRows(manifest, start)
        position = np.arange(start, rows.stop)
        for name, each in manifest.columns.items():
            count = math.prod(each.shape)
            values = columns.get(name, np.zeros(40 * count))[: 40 * count].reshape(40, *each.shape)
            columns[name] = values.astype(each.dtype)
        rows.put(start, {name: columns[name][position] for name in manifest.columns})
        LocalFolder(folder).write(Part(0, start, rows.digest).name, rows.content)
    LocalFolder(folder).remove_working()
    return folder
