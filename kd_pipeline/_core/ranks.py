"""Which of the processes that a launcher started this is: `torchrun`, `mpirun` or `srun`, read from the environment."""

import os
import re
from dataclasses import dataclass

from kd_pipeline.errors import ConfigError

__all__ = [
    "Launched",
    "is_rank_zero",
    "launched",
    "local_world_size",
    "num_nodes",
    "slurm_tasks_per_node",
    "world_size",
]


@dataclass(frozen=True, slots=True)
class _Launcher:
    """The variables that a launcher sets in each process."""

    name: str
    rank: str
    world_size: str
    local_world_size: str | None = None


_TORCHRUN = _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# Not SLURM_NTASKS: a batch script has it too, although it is a single process.
_SRUN = _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
_LAUNCHERS = (
    _TORCHRUN,
    # Before SLURM: in a job, mpirun starts its daemons by srun, whose variables all of its processes inherit.
    _Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    _SRUN,
)


@dataclass(frozen=True, slots=True)
class Launched:
    """This process among those that were started together."""

    rank: int
    world_size: int
    launcher: str
    """Its name."""
    variables: str
    """The variables that say so, with their values."""


def launched() -> Launched | None:
    """What the launcher's variables say; None for a process that was started alone.

    Raises:
        ConfigError: the variables are set in part, are not numbers or contradict each other.
    """
    half = None
    for launcher in _LAUNCHERS:
        match _read(launcher):
            case Launched() as found if half is None or half.agrees_with(found):
                return found
            case _HalfSet() as found if half is None:
                half = found
    if half is not None:
        raise ConfigError(half.problem)
    return None


def is_rank_zero() -> bool:
    """Whether this is the process that writes shared files."""
    values = (os.environ.get(launcher.rank, "").strip() for launcher in _LAUNCHERS)
    rank = next(filter(None, values), "0")
    return not rank.isdecimal() or int(rank) == 0  # `launched` refuses what is no number


def world_size() -> int:
    """Processes that a launcher started on all nodes; 1 without one.

    Raises:
        ConfigError: the variable that says so is not a number.
    """
    sizes = (_number(launcher.world_size) for launcher in _LAUNCHERS)
    return next((size for size in sizes if size), 1)


def local_world_size() -> int:
    """Processes that a launcher started on this node; 1 without one.

    Raises:
        ConfigError: the variable that says so is not a number.
    """
    for launcher in _LAUNCHERS:
        if launcher.local_world_size is not None and (size := _number(launcher.local_world_size)):
            return size
    return slurm_tasks_per_node() or 1


def num_nodes() -> int:
    """Nodes of the run; known before `init_distributed` too.

    Raises:
        ConfigError: a variable that says so is not a number.
    """
    for launcher in _LAUNCHERS:
        if launcher.local_world_size is not None and (local := _number(launcher.local_world_size)):
            return max(1, world_size() // local)
    return _number("SLURM_STEP_NUM_NODES") or 1


def slurm_tasks_per_node() -> int | None:
    """Processes of this SLURM step on this node; None outside of a step."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE")  # such as 4(x2),3
    if not counts or _number(_SRUN.world_size) is None:
        return None
    expanded = [
        int(count) for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(repeats or 1))
    ]
    node = _number("SLURM_NODEID") or 0
    return expanded[node] if node < len(expanded) else None


def _read(launcher: _Launcher) -> "Launched | _HalfSet | None":
    """What one launcher says; None if it did not start this process."""
    rank, size = _number(launcher.rank), _number(launcher.world_size)
    if rank is not None and size is not None:
        if rank < size:
            variables = f"{launcher.rank}={rank} and {launcher.world_size}={size}"
            return Launched(rank, size, launcher.name, variables)
        raise ConfigError(
            f"{launcher.rank} is {rank} and {launcher.world_size} is {size}, but ranks are 0 to {launcher.world_size} "
            f"- 1; {_way_out(launcher)}"
        )
    # A batch script of SLURM has a rank without being a step, and a single process needs no rank.
    is_alone = size is None if launcher is _SRUN else (rank, size) == (None, None)
    return None if is_alone or (rank, size) == (None, 1) else _HalfSet(launcher, rank, size)


@dataclass(frozen=True, slots=True)
class _HalfSet:
    """A launcher's variables of which one is missing."""

    launcher: _Launcher
    rank: int | None
    world_size: int | None

    def agrees_with(self, other: Launched) -> bool:
        """Whether `other` is the rest of it: job scripts often set WORLD_SIZE alone, and srun or mpirun the rank."""
        return self.rank in (None, other.rank) and self.world_size in (None, other.world_size)

    @property
    def problem(self) -> str:
        """The sentence of the error."""
        rank, size = self.launcher.rank, self.launcher.world_size
        if self.rank is None:
            found = f"{size} is {self.world_size} but {rank} is not set, so this process does not know which one of "
            return f"{found}{self.world_size} it is; {_way_out(self.launcher)}"
        found = f"{rank} is {self.rank} but {size} is not set, so this process does not know how many share the data"
        return f"{found}; {_way_out(self.launcher)}"


def _number(variable: str) -> int | None:
    """The number in an environment variable; None if it is not set."""
    value = os.environ.get(variable, "").strip()
    if not value:
        return None
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(
            f"the environment variable {variable} must be a whole number of at least 0, got {value!r}; set it right, "
            "or unset it"
        )
    return number


def _way_out(launcher: _Launcher) -> str:
    return f"start with {launcher.name}, which sets both, set both yourself, or unset both for a single process"
