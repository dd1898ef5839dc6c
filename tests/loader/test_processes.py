"""A loader among other processes: on the right shard, or refused in a clear sentence."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_pipeline.data.plan import Shard
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.loader.loader import KDDataLoader
from tests.forks import Command, fork_ranks
from tests.loader.rank_worker import NUM_SAMPLES, gather, meet_after_the_loader, open_loader, step, student

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`meet(rank, world_size)` makes `torch.distributed` say so; a size of 0 ends the group."""

    def as_group(rank: int, world_size: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world_size > 0)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)

    return as_group


def indices(loader: KDDataLoader) -> list[int]:
    return [index for batch in loader for index in batch.index[batch.valid].tolist()]


# The shard


def test_shard_is_adopted_until_the_first_batch(meet):
    with open_loader(shard=Shard(1, 2), last_batch="pad") as wanted, open_loader() as loader:
        assert (loader.shard, loader.plan.last_batch) == (Shard(0, 1), "keep")
        state = loader.state_dict()
        meet(1, 2)
        assert len(loader) == 3
        assert indices(loader) == indices(wanted)
        assert (loader.shard, loader.plan.last_batch) == (Shard(1, 2), "pad")
        assert loader.state_dict()["fingerprint"]["global_batch_size"] == 16
        with pytest.raises(StateError, match="global_batch_size: 8 → 16"):
            loader.load_state_dict(state)


def test_both_ranks_of_half_set_variables_meet(meet, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # Lightning's own launcher sets no RANK
    with open_loader() as loader:
        meet(1, 2)
        assert (loader.shard, len(loader)) == (Shard(1, 2), 3)


@pytest.mark.parametrize("use", [len, list, KDDataLoader.peek, lambda loader: next(iter(loader))])
@pytest.mark.parametrize(
    ("variables", "message"),
    [({"WORLD_SIZE": "2"}, "RANK is not set"), ({"RANK": "1"}, "WORLD_SIZE is not set"), ({"RANK": "x"}, "got 'x'")],
    ids=str,
)
def test_half_set_variables_are_refused_at_first_use(monkeypatch, variables, message, use):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with open_loader() as loader, pytest.raises(ConfigError) as info:
        use(loader)
    assert message in str(info.value)
    assert "init_process_group" in str(info.value) and "shard=Shard(rank, world_size)" in str(info.value)


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (len, "len"),
        (lambda loader: loader.load_state_dict(loader.state_dict()), "position was loaded"),
        (lambda loader: next(iter(loader)), "first batch was read"),
        (list, "len"),
    ],
)
def test_world_that_changes_after_use_is_refused(meet, use, what):
    with open_loader() as loader:
        use(loader)
        meet(0, 2)
        for again in (list, KDDataLoader.peek):
            with pytest.raises(StateError) as info:
                again(loader)
            assert "rank 0 of 2 now" in str(info.value) and "was rank 0 of 1 when" in str(info.value)
            assert what in str(info.value)


def test_process_group_that_ended_is_noticed(meet):
    meet(1, 2)
    with open_loader() as loader:
        indices(loader)
        meet(0, 0)
        with pytest.raises(StateError, match=r"rank 0 of 1 now .* was rank 1 of 2"):
            indices(loader)


def test_rank_is_adopted_after_len(meet, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with open_loader() as loader:
        assert len(loader) == 3
        meet(1, 2)
        next(iter(loader))
        assert loader.shard == Shard(1, 2)


def test_given_shard_wins(meet):
    meet(1, 2)
    with open_loader(shard=Shard()) as loader:
        assert sorted(indices(loader)) == list(range(NUM_SAMPLES))
        meet(0, 4)
        assert sorted(indices(loader)) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
    ],
    ids=str,
)
def test_launcher_without_process_group(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with open_loader() as loader:
        assert loader.shard == Shard(1, 2) and len(indices(loader)) == 16


def test_ranks_pad_by_default_and_drop_nothing():
    found = []
    for rank in range(2):
        with open_loader(shard=Shard(rank, 2)) as loader:
            assert {len(batch) for batch in loader} == {8}
            found += indices(loader)
    assert sorted(found) == list(range(NUM_SAMPLES))


def read(folder: Path) -> list[Any]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_spawned_processes_meet_after_the_loader(tmp_path):
    fork_ranks(meet_after_the_loader, (str(tmp_path),))
    found = read(tmp_path)
    assert [each["length"] for each in found] == [3, 3] == [len(each["batches"]) for each in found]
    seen = [index for each in found for batch in each["batches"] for index in batch]
    assert sorted(seen) == list(range(NUM_SAMPLES))


@pytest.mark.slow
def test_gather_for_metrics_has_every_sample_once(tmp_path):
    pytest.importorskip("accelerate")
    fork_ranks(gather, (str(tmp_path),))
    for found in read(tmp_path):
        assert sorted(found) == list(range(NUM_SAMPLES))


@pytest.mark.slow
def test_lightning_starts_its_own_processes(tmp_path):
    pytest.importorskip("lightning")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.loader.rank_worker", "lightning", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path)
    assert [each["length"] for each in found] == [3, 3]
    assert sorted(index for each in found for index in each["seen"]) == list(range(NUM_SAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["accelerate", "ddp"])
def test_two_processes_train_as_one_with_their_global_batch(how, tmp_path):
    if how == "accelerate":
        pytest.importorskip("accelerate")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.loader.rank_worker", how, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = read(tmp_path)
    assert first == second and first["world_size"] == 2
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with open_loader(batch_size=16, last_batch="drop") as loader:
        for _ in range(2):
            for batch in loader:
                if (loader.epoch, loader.num_returned) != (0, 1):
                    step(model, optimizer, batch, torch.Tensor.backward)
    for found, parameter in zip(first["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(found), parameter.detach())


# Loops of the user's own, compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step_trains_as_a_plain_one(backend):
    def loss_of(model, batch):
        return torch.nn.functional.cross_entropy(model(batch.images), batch["labels"]) + 0 * batch.valid.sum()

    def trained(loss) -> torch.nn.Module:
        model = student()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with open_loader() as loader:
            for batch in loader:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
        return model

    torch._dynamo.reset()
    compiled, plain = trained(torch.compile(loss_of, backend=backend)), trained(loss_of)
    torch._dynamo.reset()
    for first, second in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(first, second)


# Copies


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_loader_is_not_copied(copied):
    with open_loader() as loader, pytest.raises(StateError, match="cannot be pickled or copied") as info:
        copied(loader)
    assert isinstance(info.value, TypeError) and "load_state_dict(state)" in str(info.value)


# A torch loader around ours, as `accelerate.skip_first_batches` makes one


def numbers(batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def test_skip_first_batches_reads_the_rest_of_each_epoch():
    accelerate = pytest.importorskip("accelerate")
    with open_loader() as loader, open_loader() as plain:
        accelerator = accelerate.Accelerator(cpu=True)
        loader = accelerator.prepare(loader)
        wanted = [numbers(plain) for _ in range(3)]
        skipped = accelerator.skip_first_batches(loader, 2)
        assert len(skipped) == 3 and loader.epoch == 0
        assert numbers(skipped) == wanted[0][2:]
        assert (loader.epoch, loader.num_returned) == (1, 0) and numbers(loader) == wanted[1]
        loader.set_epoch(2)
        assert numbers(accelerate.skip_first_batches(loader, 0)) == wanted[2]
        assert loader.epoch == 3


def test_skipped_batches_are_not_read():
    accelerate = pytest.importorskip("accelerate")
    with open_loader() as loader:
        numbers_read = []
        read = loader.source.read
        loader.source.read = lambda indices: (numbers_read.append(len(indices)), read(indices))[1]
        assert len(numbers(accelerate.skip_first_batches(loader, 4))) == 1
        first = numbers_read[0]
        assert first == NUM_SAMPLES - 4 * 8  # not the batches before


def test_skipped_loader_counts_and_saves():
    accelerate = pytest.importorskip("accelerate")
    with open_loader() as loader, open_loader() as other, open_loader() as plain:
        wanted = numbers(plain)
        batches = iter(accelerate.skip_first_batches(loader, 2))
        assert next(batches).index.tolist() == wanted[2]
        assert (loader.epoch, loader.num_returned) == (0, 3)
        other.load_state_dict(loader.state_dict())
        assert numbers(other) == wanted[3:] == numbers(batches)


def test_a_torch_loader_of_the_samples_says_what_it_needs():
    with open_loader() as loader:
        wrong = torch.utils.data.DataLoader(loader.dataset, batch_size=4, collate_fn=loader.collate_fn)
        with pytest.raises(TypeError, match=r"batch_sampler=loader\.batch_sampler"):
            next(iter(wrong))
        right = {"batch_sampler": loader.batch_sampler, "collate_fn": loader.collate_fn}
        assert len(numbers(torch.utils.data.DataLoader(loader.dataset, **right))) == len(loader)


# Forks. They are started in another process, as threads of the test's own process would not live in them.

FORK = """
import gc, os, sys
from tests.loader.rank_worker import {opener} as open_loader
unused, loader = open_loader(), open_loader()
batches = iter(loader)
next(batches)
child = os.fork()
if not child:
    {child}
    sys.exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print("child", status, "parent", 1 + sum(1 for _ in batches))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opener", "child"),
    [
        ("open_loader", "pass"),
        ("open_loader", "loader.close(); loader.close()"),
        ("open_loader", "del loader, batches; gc.collect()"),
        ("open_loader", "assert len(list(unused)) == 5"),
        ("open_loader", "assert len(list(open_loader())) == 5"),
        ("open_loader", "assert loader.state_dict()['batch'] == 1"),
        ("open_batch_loader", "del batches; loader.close(); loader.close()"),
        ("open_batch_loader", "assert len(list(unused)) == 5"),
    ],
)
def test_forked_child_ends_as_it_should(opener, child):
    output, errors = fork(opener, child)
    assert output == "child 7 parent 5\n", errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opener", "child"),
    [
        ("open_loader", "next(batches)"),
        ("open_loader", "list(loader)"),
        ("open_loader", "loader.peek()"),
        ("open_loader", "loader.load_state_dict(loader.state_dict())"),
        ("open_batch_loader", "next(batches)"),
        ("open_batch_loader", "list(loader)"),
    ],
)
def test_use_in_a_forked_child_is_refused(opener, child):
    output, errors = fork(opener, child)
    assert output == "child 1 parent 5\n"
    (line,) = [line for line in errors.splitlines() if line.startswith("kd_pipeline.errors.StateError")]
    assert "is a fork" in line and "Make the loader in the child" in line


def fork(opener: str, child: str) -> tuple[str, str]:
    """What the process and its child print, and write to stderr."""
    return Command([], ROOT, script=FORK.format(opener=opener, child=child)).communicate()


def test_closed_loaders_are_forgotten():
    with open_loader() as loader:
        list(loader)
    reference = weakref.ref(loader)
    del loader
    gc.collect()
    assert reference() is None
