"""Checkpoint files survive kills and full disks and run no code."""

import json
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kd_pipeline.training.checkpoint_callback import AtomicCheckpointIO
from tests.training.toy_training import max_file_size


def checkpoint(number: int, num_values: int = 4) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((num_values,), float(number))}, "number": number}


# Atomic writes

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
torch.set_num_threads(1)
path, generator = Path(sys.argv[1]), random.Random(0)

def checkpoint(number):
    return {"state_dict": {"weight": torch.full((1_000_000,), float(number))}, "number": number}

save_checkpoint(checkpoint(0), path)
before, num_cut_off, num_new = 0, 0, 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        number = before
        while True:
            number += 1
            save_checkpoint(checkpoint(number), path)
    time.sleep(generator.uniform(0.02, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    num_cut_off += len(os.listdir(path.parent)) > 1
    found = load_checkpoint(path)
    assert (found["state_dict"]["weight"] == found["number"]).all(), "the file mixes two checkpoints"
    assert found["number"] >= before, "the file went back"
    num_new += found["number"] > before
    before = found["number"]
save_checkpoint(checkpoint(before), path)
print(json.dumps({"cut_off": num_cut_off, "new": num_new, "left": os.listdir(path.parent)}))
"""


@pytest.mark.slow
def test_save_survives_kills(tmp_path):
    elsewhere = "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"
    child = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "saved" / "last.ckpt"],
        env={**os.environ, "TMPDIR": elsewhere, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert found["cut_off"], "no kill came during a save: the test proved nothing"
    assert found["new"], "no save was finished: the test proved nothing"
    assert found["left"] == ["last.ckpt"]


def test_full_disk_keeps_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)
    with max_file_size(1 << 20), pytest.raises(StateError) as caught:
        save_checkpoint(checkpoint(2, num_values=1 << 20), path)
    assert str(path) in str(caught.value)
    assert "File too large" in str(caught.value)
    assert load_checkpoint(path)["number"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_uncreatable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/last\.ckpt cannot be written"):
        save_checkpoint(checkpoint(1), tmp_path / "file" / "last.ckpt")


def test_save_syncs_file_then_name(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        calls.append("name")
        assert source.parent == target.parent == tmp_path
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert calls == ["file", "name", "folder"]


def test_save_removes_its_own_temporary_files(tmp_path):
    own, other = tmp_path / ".last.ckpt.0a1b.tmp", tmp_path / ".best.ckpt.0a1b.tmp"
    own.touch()
    other.touch()
    save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert not own.exists()
    assert other.exists()


# Plain data only

PLAIN = {
    "none": None,
    "numbers": [True, 2**70, 0.5, 1j],
    "text": ["ü", b"\x00", bytearray(b"\x01")],
    "containers": ((1, ()), {2}, OrderedDict(a=1), Counter("aab"), {3: {None: 4}}),
    "torch": [torch.float16, torch.device("cpu"), torch.Size([1]), torch.strided],
    "random": random.Random(0).getstate(),
}


def test_plain_data_round_trip(tmp_path):
    tensors = {"weight": torch.nn.Parameter(torch.ones(2)), "mask": torch.tensor([True]), "shared": torch.arange(3)}
    save_checkpoint({"state_dict": tensors, **PLAIN}, tmp_path / "a.ckpt")
    found = load_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(found["state_dict"][name], tensors[name]) for name in tensors)
    assert {name: found[name] for name in PLAIN} == PLAIN


def test_state_dict_metadata_round_trip(tmp_path):
    state = torch.nn.BatchNorm2d(2).state_dict()
    save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")
    assert load_checkpoint(tmp_path / "a.ckpt")["state_dict"]._metadata == state._metadata


class Color(StrEnum):
    RED = "red"


class OwnTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "foreign",
    [
        Path("a"),
        np.float64(1),
        np.zeros(2),
        np.bool_(True),
        frozenset([1]),
        defaultdict(int),
        range(2),
        Color.RED,
        torch.zeros(2).as_subclass(OwnTensor),
        ConfigError("a"),
        len,
    ],
    ids=lambda foreign: type(foreign).__name__,
)
def test_unloadable_value_is_refused_before_writing(tmp_path, foreign):
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)
    with pytest.raises(StateError) as caught:
        save_checkpoint({"callbacks": [{"best": foreign}]}, path)
    assert "checkpoint['callbacks'][0]['best'] is a " in str(caught.value)
    assert type(foreign).__name__ in str(caught.value)
    assert load_checkpoint(path)["number"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_unloadable_key_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"the key .* of checkpoint\['paths'\] is a pathlib"):
        save_checkpoint({"paths": {Path("a"): 1}}, tmp_path / "last.ckpt")


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_file_does_not_run(tmp_path):
    path, marker = tmp_path / "last.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {}, "extra": Touch(marker)}, path)
    for load in (load_checkpoint, lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False)):
        with pytest.raises(StateError, match=r"it needs \w+\.mkdir") as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_special_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(
        StateError, match=r"last\.ckpt cannot be loaded: this is a pipe and no file; use a different one"
    ):
        load_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(StateError, match="cannot be loaded: this is a directory and no file"):
        load_checkpoint(tmp_path)


def test_truncated_file_is_refused(tmp_path):
    full, cut = tmp_path / "full.ckpt", tmp_path / "cut.ckpt"
    save_checkpoint(checkpoint(1), full)
    data = full.read_bytes()
    for size in [0, 1, 10, *range(100, len(data), 97), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(StateError, match=r"cut\.ckpt cannot be loaded: it is truncated, damaged"):
            load_checkpoint(cut)


def test_flipped_bit_is_refused_or_harmless(tmp_path):
    path, generator, num_refused = tmp_path / "last.ckpt", random.Random(0), 0
    save_checkpoint(checkpoint(1, num_values=1000), path)
    data = path.read_bytes()
    for _ in range(200):
        changed = bytearray(data)
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            found = load_checkpoint(path)
        except StateError:
            num_refused += 1
        else:
            assert found["number"] == 1
            assert found["state_dict"]["weight"].tolist() == [1.0] * 1000
    assert num_refused > 100  # the rest is padding between the values


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a checkpoint", "it is truncated, damaged or not a checkpoint"),
        ([1, 2], "it holds a list and no 'state_dict'"),
        ({"weight": torch.zeros(1)}, r"it holds the keys \['weight'\] and no 'state_dict'"),
        (None, "there is no checkpoint"),
    ],
)
def test_other_file_is_refused(tmp_path, content, reason):
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(StateError, match=reason) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
