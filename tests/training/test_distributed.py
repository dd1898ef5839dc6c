"""Process groups under torchrun and SLURM."""

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from kd_pipeline._core.ranks import is_rank_zero, num_nodes, world_size
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.distributed import _first_host, _torchrun_environment, init_distributed
from tests.forks import Command, free_port
from tests.runs import finish

RUN = Path("runs/tiny")
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_slurm_step_as_torchrun_environment(slurm: pytest.MonkeyPatch) -> None:
    assert (world_size(), num_nodes(), is_rank_zero()) == (8, 2, False)
    wanted = ("5", "8", "1", "4", "node07", str(15_000 + 4711))
    assert tuple(_torchrun_environment()[name] for name in TORCHRUN) == wanted
    slurm.setenv("MASTER_PORT", "1234")
    slurm.setenv("MASTER_ADDR", "10.0.0.1")
    assert (_torchrun_environment()["MASTER_ADDR"], _torchrun_environment()["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_torchrun_takes_precedence(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("RANK", "0")
    slurm.setenv("WORLD_SIZE", "6")
    slurm.setenv("LOCAL_WORLD_SIZE", "2")
    assert (world_size(), num_nodes(), is_rank_zero()) == (6, 3, True)


def test_batch_script_is_one_process(slurm: pytest.MonkeyPatch) -> None:
    slurm.delenv("SLURM_STEP_NUM_TASKS")
    slurm.delenv("SLURM_STEP_NUM_NODES")
    slurm.setenv("SLURM_NTASKS", "8")
    slurm.setenv("SLURM_PROCID", "0")
    assert (world_size(), num_nodes(), is_rank_zero()) == (1, 1, True)


def test_uneven_nodes_are_refused(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2),3")
    with pytest.raises(ConfigError, match=r"started 4\(x2\),3 processes per node"):
        _torchrun_environment()


OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_mpi_as_torchrun_environment(slurm: pytest.MonkeyPatch) -> None:
    for name, value in INTEL_MPI.items():
        slurm.setenv(name, value)
    wanted = ("1", "2", "1", "2", "127.0.0.1", "29500")
    assert tuple(_torchrun_environment()[name] for name in TORCHRUN) == wanted


def test_mpi_on_several_nodes_needs_the_first_host(slurm: pytest.MonkeyPatch) -> None:
    for name, value in OPEN_MPI.items():
        slurm.setenv(name, value)
    with pytest.raises(ConfigError, match="set MASTER_ADDR to the host of rank 0"):
        _torchrun_environment()
    slurm.setenv("MASTER_ADDR", "node07")
    found = _torchrun_environment()
    assert tuple(found[name] for name in (*TORCHRUN, "GROUP_RANK")) == ("3", "4", "1", "2", "node07", "29500", "1")
    slurm.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "3")
    with pytest.raises(ConfigError, match="needs the same number on each node"):
        _torchrun_environment()


def test_half_set_variables_are_refused_before_they_are_used(slurm: pytest.MonkeyPatch) -> None:
    for name in STEP:
        slurm.delenv(name)
    slurm.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 but RANK is not set"):
        init_distributed()
    slurm.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun"):
        init_distributed()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("alone", "alone"), ("a,b", "a"), ("node[01-04,7],other", "node01"), ("gpu-a[10,12]", "gpu-a10")],
)
def test_first_host(hosts: str, first: str) -> None:
    assert _first_host(hosts) == first


def start_by_slurm(folder: Path, *arguments: str) -> list[Command]:
    """Start `srun --ntasks 2 kd-pipeline train -c tiny.yaml ...` in a job with more tasks than that."""
    own = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment = {**own, "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "4711"}
    environment |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    environment |= {"MASTER_PORT": str(free_port()), "SLURM_NODEID": "0"}
    command = ["train", "-c", "tiny.yaml", *arguments]
    return [Command(command, folder, {**environment, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]


def listening(process: int) -> set[str]:
    """Addresses on which a process takes connections, as in /proc/net: bytes of each word in reverse order."""
    links = [os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir()]
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                found.add(fields[1].partition(":")[0])
    return found


def test_port_in_use_is_a_clear_error(slurm: pytest.MonkeyPatch) -> None:
    slurm.setenv("SLURM_STEP_NUM_TASKS", "2")
    slurm.setenv("SLURM_STEP_NUM_NODES", "1")
    slurm.setenv("SLURM_STEP_TASKS_PER_NODE", "2")
    slurm.setenv("SLURM_PROCID", "0")
    for name in (*TORCHRUN, "GROUP_RANK", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        slurm.setenv(name, "")  # what is set in the test is undone
        slurm.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        slurm.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"cannot meet at port {port} of 127.0.0.1: .* in use; set MASTER_PORT"):
            init_distributed()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and os.environ["NCCL_SOCKET_IFNAME"] == "=lo"


@pytest.mark.parametrize(
    ("device", "wanted"), [("cpu", [("backend", "gloo")]), ("auto", [("gpu", 1), ("backend", "nccl")])]
)
def test_run_on_the_cpu_leaves_gpus_alone(
    slurm: pytest.MonkeyPatch, device: str, wanted: list[tuple[str, object]]
) -> None:
    for name, value in zip(TORCHRUN, ("5", "8", "1", "4", "node07", "1234"), strict=True):
        slurm.setenv(name, value)
    done: list[tuple[str, object]] = []
    slurm.setattr(torch.cuda, "is_available", lambda: True)
    slurm.setattr(torch.cuda, "set_device", lambda number: done.append(("gpu", number)))
    slurm.setattr(torch.distributed, "init_process_group", lambda backend: done.append(("backend", backend)))
    init_distributed(device)
    assert done == wanted


@pytest.mark.slow
def test_slurm_tasks_train_and_stop_together(trained_teacher: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained_teacher, work)
    last = work / RUN / "checkpoints" / "last.ckpt"
    processes = start_by_slurm(work, "data.batch_size=16")
    while not last.exists() and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    # Only this machine can connect to a run on one machine: to the store of rank 0, and to each rank.
    assert [listening(process.pid) for process in processes] == [{"0100007F"}, {"0100007F"}]
    processes[1].send_signal(signal.SIGUSR1)  # SLURM sends it to all, but one is enough
    for status, output in map(finish, processes):
        assert status == 143 and "Traceback" not in output, output
    num_steps = 330 // (2 * 16)
    assert 0 < load_checkpoint(last)["global_step"] < 2 * num_steps
    for status, output in map(finish, start_by_slurm(work, "data.batch_size=16")):
        assert status == 0, output
    assert load_checkpoint(last)["global_step"] == 2 * num_steps
