import pytest

from kd_pipeline._core import ranks
from kd_pipeline._core.ranks import is_rank_zero, launched, local_world_size, num_nodes, world_size
from kd_pipeline.errors import ConfigError

VARIABLES = [name for each in ranks._LAUNCHERS for name in (each.rank, each.world_size, each.local_world_size) if name]
STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def start(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in (*VARIABLES, "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, 2, 4),
        (STEP, 1, 2),
        (OPEN_MPI, 3, 4),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, 0, 2),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, 1, 2),
        ({**STEP, **OPEN_MPI}, 3, 4),  # mpirun in a job, whose daemons are a step
        ({**STEP, "RANK": "5", "WORLD_SIZE": "8"}, 5, 8),  # torchrun on each node of a step
        ({**STEP, "WORLD_SIZE": "2"}, 1, 2),  # exported by the job's script
        ({**OPEN_MPI, "RANK": "3"}, 3, 4),
        ({"RANK": " 1 ", "WORLD_SIZE": "2"}, 1, 2),
    ],
    ids=str,
)
def test_launchers(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], rank: int, size: int) -> None:
    start(monkeypatch, **variables)
    found = launched()
    assert found is not None and (found.rank, found.world_size) == (rank, size)
    assert (is_rank_zero(), world_size()) == (rank == 0, size)


@pytest.mark.parametrize(
    "variables",
    [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "", "RANK": ""}],
    ids=["alone", "batch script", "world of one", "empty"],
)
def test_single_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    start(monkeypatch, **variables)
    assert launched() is None
    assert (is_rank_zero(), world_size(), local_world_size(), num_nodes()) == (True, 1, 1, 1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": "1"}, "RANK is 1 but WORLD_SIZE is not set"),
        ({"RANK": "0"}, "RANK is 0 but WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2, but ranks are 0 to WORLD_SIZE - 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number of at least 0, got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number of at least 0, got 'two'"),
        ({"RANK": "0.0", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"WORLD_SIZE": "4", **STEP}, "WORLD_SIZE is 4 but RANK is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2 but SLURM_PROCID is not set"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is 1 but OMPI_COMM_WORLD_SIZE is not set"),
        ({"PMI_RANK": "7", "PMI_SIZE": "4"}, "PMI_RANK is 7 and PMI_SIZE is 4"),
    ],
    ids=str,
)
def test_half_set_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    start(monkeypatch, **variables)
    with pytest.raises(ConfigError) as info:
        launched()
    assert message in str(info.value) and "unset" in str(info.value)


@pytest.mark.parametrize(
    ("variables", "local", "nodes"),
    [
        ({"RANK": "0", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}, 2, 3),
        (OPEN_MPI, 2, 2),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"}, 4, 1),
        ({**STEP, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 1, 2),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "3"}, 3, 3),
    ],
    ids=str,
)
def test_processes_of_this_node(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], local: int, nodes: int
) -> None:
    start(monkeypatch, **variables)
    assert (local_world_size(), num_nodes()) == (local, nodes)
