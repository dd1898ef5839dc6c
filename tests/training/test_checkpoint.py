"""A checkpoint survives kills and full disks, runs no code, and goes on exactly where it was taken."""

import json
import math
import os
import random
import resource
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.checkpoint import atomic_checkpoint_io, check_same_run, load_checkpoint, save_checkpoint
from tests.training.tiny import NUM_BATCHES, NUM_EPOCHS, train

# Lightning has advice on workers, loggers and the trainer's options, none of which is about checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def checkpoint(number: int, num_values: int = 4) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((num_values,), float(number))}, "number": number}


# Whole or not at all

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


def test_twenty_kills_while_saving_leave_a_file_that_loads_and_no_rubbish_after_the_next_save(tmp_path):
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
    assert found["cut_off"], "no kill came in the middle of a save: this run has shown nothing"
    assert found["new"], "no save was ever finished: this run has shown nothing"
    assert found["left"] == ["last.ckpt"]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond; a write then fails as it does on a full disk, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_the_disk_is_full_the_error_names_file_and_cause_and_the_previous_checkpoint_loads(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)
    with largest_file(1 << 20), pytest.raises(StateError) as caught:
        save_checkpoint(checkpoint(2, num_values=1 << 20), path)
    assert str(path) in str(caught.value)
    assert "File too large" in str(caught.value)
    assert load_checkpoint(path)["number"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/last\.ckpt cannot be written"):
        save_checkpoint(checkpoint(1), tmp_path / "file" / "last.ckpt")


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_before_the_save_returns(tmp_path, monkeypatch):
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


def test_a_save_removes_the_temporary_files_of_its_own_name_only(tmp_path):
    mine, others = tmp_path / ".last.ckpt.0a1b.tmp", tmp_path / ".best.ckpt.0a1b.tmp"
    mine.touch()
    others.touch()
    save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert not mine.exists()
    assert others.exists()


# Plain data only

PLAIN = {
    "none": None,
    "numbers": [True, 2**70, 0.5, 1j],
    "text": ["ü", b"\x00", bytearray(b"\x01")],
    "containers": ((1, ()), {2}, OrderedDict(a=1), Counter("aab"), {3: {None: 4}}),
    "torch": [torch.float16, torch.device("cpu"), torch.Size([1]), torch.strided],
    "random": random.Random(0).getstate(),
}


def test_all_that_is_accepted_comes_back_equal(tmp_path):
    tensors = {"weight": torch.nn.Parameter(torch.ones(2)), "mask": torch.tensor([True]), "shared": torch.arange(3)}
    save_checkpoint({"state_dict": tensors, **PLAIN}, tmp_path / "a.ckpt")
    found = load_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(found["state_dict"][name], tensors[name]) for name in tensors)
    assert {name: found[name] for name in PLAIN} == PLAIN


def test_the_version_marks_of_a_state_dict_come_back(tmp_path):
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
def test_what_would_not_load_is_refused_by_its_place_and_type_before_anything_is_written(tmp_path, foreign):
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)
    with pytest.raises(StateError) as caught:
        save_checkpoint({"callbacks": [{"best": foreign}]}, path)
    assert "checkpoint['callbacks'][0]['best'] is a " in str(caught.value)
    assert type(foreign).__name__ in str(caught.value)
    assert load_checkpoint(path)["number"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_key_that_would_not_load_is_refused_too(tmp_path):
    with pytest.raises(StateError, match=r"the key .* of checkpoint\['paths'\] is a pathlib"):
        save_checkpoint({"paths": {Path("a"): 1}}, tmp_path / "last.ckpt")


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_does_not_run_and_the_message_does_not_advise_to_run_it(tmp_path):
    path, marker = tmp_path / "last.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {}, "extra": Touch(marker)}, path)
    for load in (load_checkpoint, lambda path: atomic_checkpoint_io().load_checkpoint(path, weights_only=False)):
        with pytest.raises(StateError, match=r"it asks for \w+\.mkdir") as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path):
    whole, cut = tmp_path / "whole.ckpt", tmp_path / "cut.ckpt"
    save_checkpoint(checkpoint(1), whole)
    data = whole.read_bytes()
    for size in [0, 1, 10, *range(100, len(data), 97), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(StateError, match=r"cut\.ckpt is no checkpoint that can be loaded: it is cut off, damaged"):
            load_checkpoint(cut)


def test_a_file_in_which_a_bit_has_changed_is_refused_or_loads_as_it_was(tmp_path):
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
        (b"not a checkpoint", "it is cut off, damaged or something else"),
        ([1, 2], "it holds a list, and no 'state_dict'"),
        ({"weight": torch.zeros(1)}, r"it holds the keys \['weight'\], and no 'state_dict'"),
        (None, "there is no checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path, content, reason):
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(StateError, match=reason) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_lightning_removes_a_checkpoint_and_does_not_mind_one_that_is_gone(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)
    for _ in range(2):
        atomic_checkpoint_io().remove_checkpoint(path)
        assert not path.exists()


# The same run

RUN = {"teacher": {"sha256": "ab", "precision": "fp32"}, "classes": ["cat", "dog"], "data": "f00d"}


def test_the_same_run_is_let_through_though_lists_were_tuples():
    check_same_run(RUN, {**RUN, "classes": ("cat", "dog")})


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({**RUN, "teacher": {"sha256": "cd", "precision": "fp32"}}, "teacher.sha256: 'ab' → 'cd'"),
        ({**RUN, "classes": ["cat", "cow"]}, "classes[1]: 'dog' → 'cow'"),
        ({**RUN, "classes": ["cat"]}, "classes: 2 entries → 1 entries"),
        ({**RUN, "data": None}, "data: 'f00d' → None"),
        ({**RUN, "student": "resnet"}, "student: None → 'resnet'"),
        ({name: RUN[name] for name in ("teacher", "classes")}, "data: 'f00d' → None"),
    ],
)
def test_another_run_is_refused_with_each_difference_old_to_new(now, line):
    with pytest.raises(StateError) as caught:
        check_same_run(RUN, now)
    assert [found.strip() for found in str(caught.value).splitlines()[1:-1]] == [line]


def test_of_many_differences_the_first_are_shown_and_the_rest_counted():
    with pytest.raises(StateError, match=r"classes\[9\]: 9 → 109\n  and 990 more\n"):
        check_same_run({"classes": [*range(1000)]}, {"classes": [*range(100, 1100)]})


# When a run is saved


class Recorder:
    """A `CheckpointIO` that also notes what is saved at which step, and may keep a copy of each."""

    def __new__(cls, folder: Path | None = None) -> Any:
        io = atomic_checkpoint_io()
        save, io.saved = io.save_checkpoint, []

        def recorded(state: dict[str, Any], path: Path, storage_options: Any = None) -> None:
            io.saved.append((Path(path).name, state["global_step"]))
            save(state, path)
            if folder is not None:
                save(state, folder / f"{Path(path).stem}-{state['global_step']}.ckpt")

        io.save_checkpoint = recorded
        return io


def same_weights(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_last_is_saved_every_so_many_steps_and_after_every_epoch_but_not_behind_its_last_batch(tmp_path):
    io = Recorder()
    train(tmp_path, io=io, every_n_steps=3)
    assert io.saved == [("last.ckpt", step) for step in (3, 6, 9, 12, 15, 18)]
    assert len(io.saved) == NUM_EPOCHS * NUM_BATCHES // 3  # one save, not two, at the end of an epoch


def test_within_an_accumulation_nothing_is_saved(tmp_path):
    io = Recorder()
    train(tmp_path, io=io, every_n_steps=1, accumulate_grad_batches=4)
    assert io.saved == [("last.ckpt", step) for step in range(1, 7)]  # steps behind batches 4 and 6 of each epoch


@pytest.mark.parametrize(("mode", "best"), [("max", [6, 12]), ("min", [6, 18])])
def test_the_best_is_saved_when_the_metric_is_better_whole_and_as_a_student(tmp_path, mode, best):
    io, scores = Recorder(), [0.2, 0.5, 0.1]
    _, saver = train(tmp_path, io=io, scores=scores, mode=mode)
    assert [step for name, step in io.saved if name == "best.ckpt"] == best
    assert saver.best_score == pytest.approx(max(scores) if mode == "max" else min(scores))
    whole = load_checkpoint(tmp_path / "best.ckpt")
    assert whole["global_step"] == best[-1]
    student = torch.load(tmp_path / "best_student.pt", weights_only=True)
    assert same_weights({f"student.{name}": weight for name, weight in student.items()}, whole["state_dict"])


def test_nan_is_never_the_best(tmp_path):
    io = Recorder()
    _, saver = train(tmp_path, io=io, scores=[math.nan, 0.1, math.nan])
    assert [step for name, step in io.saved if name == "best.ckpt"] == [2 * NUM_BATCHES]
    assert saver.best_score == pytest.approx(0.1)


def test_a_resumed_run_knows_the_best_score_so_far_even_in_a_folder_that_was_moved(tmp_path):
    copies, io = tmp_path / "all", Recorder()
    train(tmp_path / "first", io=Recorder(copies), scores=[0.5, 0.4, 0.6])
    train(tmp_path / "second", io=io, resume=copies / "last-6.ckpt", scores=[0.5, 0.4, 0.6])
    assert io.saved == [("last.ckpt", 12), ("best.ckpt", 18), ("last.ckpt", 18)]


def test_a_run_that_goes_by_another_metric_looks_for_the_best_anew(tmp_path):
    copies, io = tmp_path / "all", Recorder()
    train(tmp_path / "first", io=Recorder(copies), scores=[0.1, 0.4, 0.3])
    train(tmp_path / "second", io=io, resume=copies / "last-6.ckpt", scores=[0.1, 0.4, 0.3], mode="min")
    assert [step for name, step in io.saved if name == "best.ckpt"] == [12, 18]


def test_a_metric_that_nothing_logs_is_refused_with_those_that_are_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no metric 'val/top5' to tell the best by; there are val/top1"):
        train(tmp_path, scores=[0.1, 0.2, 0.3], monitor="val/top5")


def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_weights(tmp_path):
    copies = tmp_path / "all"
    undisturbed, _ = train(tmp_path / "first", io=Recorder(copies), every_n_steps=1)
    for step in range(1, NUM_EPOCHS * NUM_BATCHES):
        module, _ = train(tmp_path / "second", resume=copies / f"last-{step}.ckpt")
        assert same_weights(module.state_dict(), undisturbed.state_dict()), f"from step {step}"


def test_a_run_resumed_within_accumulated_batches_ends_with_the_same_weights(tmp_path):
    copies = tmp_path / "all"
    undisturbed, _ = train(tmp_path / "first", io=Recorder(copies), every_n_steps=1, accumulate_grad_batches=4)
    for step in range(1, 6):
        module, _ = train(tmp_path / "second", resume=copies / f"last-{step}.ckpt", accumulate_grad_batches=4)
        assert same_weights(module.state_dict(), undisturbed.state_dict()), f"from step {step}"


def test_a_save_that_fails_ends_the_run_with_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    train(tmp_path, every_n_steps=3)
    with largest_file(2000), pytest.raises(StateError, match=r"last\.ckpt cannot be written"):
        train(tmp_path, every_n_steps=3)
    assert load_checkpoint(path)["global_step"] == NUM_EPOCHS * NUM_BATCHES
