"""The processes of a run under `torchrun`, SLURM or MPI: how they connect, and how many CPU threads each uses."""

import os
import re
import socket
from collections.abc import Callable
from typing import Any

import torch

from kd_pipeline._core.cpu import num_cores
from kd_pipeline._core.ranks import Launched, is_rank_zero, launched, local_world_size, num_nodes
from kd_pipeline.errors import ConfigError, StateError

__all__ = ["init_distributed", "is_restart", "on_rank_zero", "set_num_threads", "set_own_gpu"]

_TORCHRUN = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOST, _LOOPBACK = "127.0.0.1", "lo"
_MPI_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def init_distributed(device: torch.device | str = "auto") -> None:
    """Initialize the default process group if there are several processes and none is initialized yet.

    Call it before the loader is opened, which asks for its shard. Under `srun` and `mpirun` it also sets the
    environment variables of `torchrun`, so the rest of the program need not know about them.

    Processes of one machine connect by its loopback interface, whatever MASTER_ADDR is. Only `torchrun` itself listens
    on all interfaces.

    Args:
        device: of the run, as in a config; on `cpu` the processes leave GPUs alone, even if there are some.

    Raises:
        ConfigError: the launcher's variables are set in part, it started a different number of processes on each node,
            or the port is in use.
    """
    if torch.distributed.is_initialized():
        return
    found = launched()
    if found is None or found.world_size == 1:
        return
    if "RANK" not in os.environ:
        os.environ.update(_torchrun_environment())
    if missing := [name for name in _TORCHRUN if not os.environ.get(name)]:
        raise ConfigError(
            f"{found.variables} are set, but not {', '.join(missing)}, as torchrun does; start with torchrun, or set "
            "them too"
        )
    on_gpu = torch.cuda.is_available() and not str(device).startswith("cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if on_gpu else "gloo"
    if num_nodes() > 1:
        torch.distributed.init_process_group(backend)
        return
    _connect_by_loopback()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        torch.distributed.init_process_group(backend)  # torchrun itself listens, and the ranks are its clients
    else:
        store = _loopback_store(found)
        torch.distributed.init_process_group(backend, store=store, rank=found.rank, world_size=found.world_size)


def set_own_gpu(device: torch.device | str = "auto") -> None:
    """Give each process that a launcher started a GPU of its machine, where the processes never meet.

    Args:
        device: of the run, as in a config; on `cpu` the processes leave GPUs alone, even if there are some.
    """
    found = launched()
    if found is None or found.world_size == 1 or str(device).startswith("cpu") or not torch.cuda.is_available():
        return
    names = ("LOCAL_RANK", *_MPI_LOCAL_RANKS, "SLURM_LOCALID")
    local_rank = next((int(os.environ[name]) for name in names if os.environ.get(name)), 0)
    torch.cuda.set_device(local_rank % torch.cuda.device_count())  # of one, if SLURM has bound each process to its own


def on_rank_zero(function: Callable[[], object]) -> None:
    """Call `function` on rank zero, while the other ranks wait for it; call it on all ranks.

    Without it, an error of rank zero would leave the others waiting in their next collective.

    Raises:
        StateError: on the other ranks, what `function` raised on rank zero.
    """
    error: Exception | None = None
    if is_rank_zero():
        try:
            function()
        except Exception as exc:
            error = exc
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        message = [None if error is None else str(error) or type(error).__name__]
        torch.distributed.broadcast_object_list(message, src=0)
        if error is None and message[0] is not None:
            raise StateError(f"rank 0 failed: {message[0]}")
    if error is not None:
        raise error


def is_restart() -> bool:
    """Whether `torchrun` or SLURM started the same command again by itself, after a failure or a preemption."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def set_num_threads(num_threads: int | None) -> None:
    """Set torch's CPU threads. None means `OMP_NUM_THREADS` if it is set, or else the cores of this process."""
    if num_threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads or num_cores())


def _connect_by_loopback() -> None:
    """Let the ranks of one machine connect to each other where no other machine can: their messages hold pickles."""
    if _LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={_LOOPBACK}")  # without = all that begin with it


def _loopback_store(found: Launched) -> Any:
    """The store by which the ranks of one machine find each other.

    torch's own listens on all interfaces, whatever MASTER_ADDR is, and takes commands from everybody.

    Raises:
        ConfigError: another process uses the port.
    """
    port, descriptor = int(os.environ["MASTER_PORT"]), None
    if found.rank == 0:
        try:
            with socket.create_server((_HOST, port)) as server:
                descriptor = server.detach()
        except OSError as exc:
            reason = os.strerror(exc.errno or 0)
            raise ConfigError(
                f"the processes cannot meet at port {port} of {_HOST}: {reason}; set MASTER_PORT to another one "
                "in all of them"
            ) from None
    return torch.distributed.TCPStore(  # type: ignore[attr-defined, unused-ignore]
        _HOST,
        port,
        found.world_size,
        is_master=found.rank == 0,
        timeout=torch.distributed.constants.default_pg_timeout,
        master_listen_fd=descriptor,
    )


def _torchrun_environment() -> dict[str, str]:
    """The variables that `torchrun` would set, from those of a SLURM step or of MPI."""
    found = launched()
    assert found is not None
    environment = {"RANK": str(found.rank), "WORLD_SIZE": str(found.world_size)}
    environment |= _from_slurm() if found.launcher == "srun" else _from_mpi(found)
    return environment | {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}


def _from_slurm() -> dict[str, str]:
    slurm = os.environ
    counts = slurm["SLURM_STEP_TASKS_PER_NODE"]  # such as 4(x2), or 4(x2),3
    if not re.fullmatch(r"\d+(\(x\d+\))?", counts):
        raise ConfigError(
            f"SLURM started {counts} processes per node, and a run needs the same number on each node; set "
            "srun --ntasks-per-node"
        )
    return {
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": counts.partition("(")[0],
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "MASTER_ADDR": _first_host(slurm["SLURM_STEP_NODELIST"]),
        # The same for all processes of a job, and different for different jobs.
        "MASTER_PORT": str(15_000 + int(slurm["SLURM_JOB_ID"]) % 5_000),
    }


def _from_mpi(found: Launched) -> dict[str, str]:
    """MPI says nothing about hosts, so on several nodes the user has to name the first."""
    local_size = local_world_size()
    local_rank = next((os.environ[name] for name in _MPI_LOCAL_RANKS if os.environ.get(name)), None)
    if found.world_size % local_size or (local_rank is None and local_size > 1):
        raise ConfigError(
            f"there are {found.world_size} processes ({found.variables}), {local_size} of them on this node, and a run "
            "needs the same number on each node; set it with mpirun (--npernode of Open MPI, -ppn of the others)"
        )
    if local_size < found.world_size and not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"there are {found.world_size} processes ({found.variables}), {local_size} of them on this node, and they "
            "do not know where to meet; set MASTER_ADDR to the host of rank 0 in all of them, such as mpirun -x "
            "MASTER_ADDR=node01 of Open MPI, -genv MASTER_ADDR node01 of the others"
        )
    return {
        "LOCAL_RANK": local_rank or "0",
        "LOCAL_WORLD_SIZE": str(local_size),
        "GROUP_RANK": str(found.rank // local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # the default of torch
    }


def _first_host(hosts: str) -> str:
    """`node01` of `node[01-04,7],other`."""
    return re.sub(r"\[(\w+).*", r"\1", hosts.split(",")[0])
