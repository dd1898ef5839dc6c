"""A signal stops a training after a checkpoint that resumes exactly, with the usual exit status."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from kd_pipeline.training.checkpoint import load_checkpoint
from tests.forks import fork_context, free_port
from tests.training.toy_training import NUM_BATCHES, NUM_EPOCHS, train, train_in_child

# Lightning's advice on workers, loggers and the trainer's options.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")

STATUS = [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
LAST = "last.ckpt"
SHORTLY = partial(time.sleep, 0.05)


class Child:
    """A training in a child process."""

    def __init__(
        self, folder: Path, *, prepare: Callable[[], Any] = int, pause: Callable[[], Any] = SHORTLY, **options: Any
    ) -> None:
        context = fork_context()
        self._steps, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=train_in_child, args=(theirs, folder, prepare, pause, options))
        self.process.start()
        theirs.close()
        self.num_steps = 0

    def wait_for_step(self, number: int) -> None:
        """Wait until the training is within this step, counted from 1."""
        while self.num_steps < number:
            assert self._steps.poll(60), "the training hangs"
            self._steps.recv()
            self.num_steps += 1

    def send(self, *signals: int) -> None:
        for number in signals:
            os.kill(self.process.pid or 0, number)

    def end(self) -> int:
        """Wait for the exit status, negative if a signal ended it; `num_steps` then counts all steps."""
        try:
            while self._steps.poll(60):
                self._steps.recv()
                self.num_steps += 1
        except EOFError:
            pass
        self.process.join(60)
        assert self.process.exitcode is not None, "the training does not end"
        return self.process.exitcode

    def catches(self, number: int) -> bool:
        """Whether the process has a handler for the signal."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.fixture
def launch() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(*args: Any, **options: Any) -> Child:
        children.append(Child(*args, **options))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder / LAST


def assert_same_end(first: Path, second: Path) -> None:
    left, right = load_checkpoint(first), load_checkpoint(second)
    assert left["global_step"] == right["global_step"] == NUM_EPOCHS * NUM_BATCHES
    assert all(torch.equal(left["state_dict"][name], weight) for name, weight in right["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), STATUS)
@pytest.mark.parametrize("step", [2, NUM_BATCHES, NUM_EPOCHS * NUM_BATCHES], ids=["within", "epoch end", "run end"])
def test_signal_saves_and_resume_is_exact(launch, undisturbed, tmp_path, number, status, step):
    child = launch(tmp_path)
    child.wait_for_step(step)
    child.send(number)
    assert child.end() == status
    assert child.num_steps == step
    assert load_checkpoint(tmp_path / LAST)["global_step"] == step
    train(tmp_path, resume=tmp_path / LAST)
    assert_same_end(tmp_path / LAST, undisturbed)


@pytest.mark.slow
def test_exit_status_of_program(tmp_path):
    program = (
        "import os, signal, sys, warnings; from pathlib import Path\n"
        "from tests.training.toy_training import train\n"
        "warnings.simplefilter('ignore')\n"
        "train(Path(sys.argv[1]), at_step=lambda: os.kill(os.getpid(), signal.SIGTERM))"
    )
    child = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout) == (143, "")
    assert child.stderr.strip() == "SIGTERM: stopping at the next checkpoint"
    assert load_checkpoint(tmp_path / LAST)["global_step"] == 1


def test_signal_waits_for_accumulation(launch, tmp_path):
    child = launch(tmp_path, accumulate_grad_batches=3)
    child.wait_for_step(1)
    child.send(signal.SIGTERM)
    assert child.end() == 143
    assert child.num_steps == 3
    assert load_checkpoint(tmp_path / LAST)["global_step"] == 1


def test_second_ctrl_c_exits_at_once(launch, tmp_path):
    child = launch(tmp_path, pause=partial(time.sleep, 600))
    child.wait_for_step(1)
    child.send(signal.SIGINT)
    while child.catches(signal.SIGINT):
        time.sleep(0.01)
    child.send(signal.SIGINT)
    assert child.end() == -signal.SIGINT
    assert child.num_steps == 1
    assert not (tmp_path / LAST).exists()


def test_second_sigterm_does_not_interrupt_save(launch, tmp_path):
    child = launch(tmp_path)
    child.wait_for_step(2)
    child.send(*[signal.SIGTERM] * 3, signal.SIGUSR1)
    assert child.end() == 143
    assert load_checkpoint(tmp_path / LAST)["global_step"] == 2


def test_first_signal_sets_status(launch, tmp_path):
    child = launch(tmp_path, pause=partial(time.sleep, 1))
    child.wait_for_step(1)
    child.send(signal.SIGINT)
    while child.catches(signal.SIGINT):
        time.sleep(0.01)
    child.send(signal.SIGTERM)
    assert child.end() == 130


def test_ignored_ctrl_c_stays_ignored(launch, tmp_path):
    child = launch(tmp_path, prepare=partial(signal.signal, signal.SIGINT, signal.SIG_IGN))
    child.wait_for_step(2)
    child.send(signal.SIGINT)
    assert child.end() == 0
    assert child.num_steps == NUM_EPOCHS * NUM_BATCHES


def fork_and_kill() -> None:
    """In a step: do what `Process.terminate()` does to a forked worker."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(writer, b"!")
        time.sleep(10)
        os._exit(0)
    os.read(reader, 1)  # Python drops signals that arrive during the fork
    os.kill(worker, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM


def test_forked_worker_dies_of_signal(launch, tmp_path):
    child = launch(tmp_path, pause=fork_and_kill, limit_train_batches=1)
    assert child.end() == 0
    assert child.num_steps == NUM_EPOCHS


# Handlers


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number, _ in STATUS]


def test_handlers_are_restored(tmp_path):
    before, within = handlers(), []
    train(tmp_path, at_step=lambda: within.append(handlers()))
    assert all(ours != theirs for ours, theirs in zip(within[0], before, strict=True))
    assert handlers() == before


def test_handlers_are_restored_after_error(tmp_path):
    before = handlers()

    def fail() -> None:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        train(tmp_path, at_step=fail)
    assert handlers() == before


def test_handlers_are_restored_after_signal(tmp_path):
    before = handlers()
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, at_step=lambda: signal.raise_signal(signal.SIGUSR1))
    assert caught.value.code == 143
    assert handlers() == before


def test_no_handlers_outside_main_thread(tmp_path):
    before, within = handlers(), []
    thread = threading.Thread(target=train, args=(tmp_path,), kwargs={"at_step": lambda: within.append(handlers())})
    thread.start()
    thread.join()
    assert within == [before] * NUM_EPOCHS * NUM_BATCHES


def test_signal_during_setup(tmp_path, monkeypatch):
    from kd_pipeline.training.signals import StopOnSignal

    take_over, steps = StopOnSignal.on_train_start, []

    def late(self: StopOnSignal, trainer: Any, module: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        take_over(self, trainer, module)

    monkeypatch.setattr(StopOnSignal, "on_train_start", late)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, at_step=lambda: steps.append(1))
    assert caught.value.code == 143
    assert steps == []


# Ranks


def set_rank(rank: int, port: int) -> None:
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def launch_ranks(launch: Callable[..., Child], folder: Path, **options: Any) -> list[Child]:
    port = free_port()
    return [
        launch(folder, prepare=partial(set_rank, rank, port), strategy="ddp", devices=2, **options) for rank in (0, 1)
    ]


@pytest.mark.parametrize("signaled", [0, 1])
def test_ranks_stop_together_and_resume_exactly(launch, tmp_path, signaled):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert [child.end() for child in launch_ranks(launch, undisturbed, pause=int)] == [0, 0]
    children = launch_ranks(launch, stopped)
    children[signaled].wait_for_step(2)
    children[signaled].send(signal.SIGTERM)
    assert [child.end() for child in children] == [143, 143]
    assert load_checkpoint(stopped / LAST)["global_step"] == children[0].num_steps == children[1].num_steps < 6
    assert [child.end() for child in launch_ranks(launch, stopped, pause=int, resume=stopped / LAST)] == [0, 0]
    assert_same_end(stopped / LAST, undisturbed / LAST)
