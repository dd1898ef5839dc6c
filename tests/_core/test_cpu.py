import os
from pathlib import Path

import pytest

from kd_pipeline._core import cpu
from kd_pipeline._core.cpu import NUM_CORES_VARIABLE, num_cores
from kd_pipeline.errors import ConfigError


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with eight cores and no quota; returns the cgroup folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
    for name in (NUM_CORES_VARIABLE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_affinity() -> None:
    assert num_cores() == 8


@pytest.mark.parametrize(("processes", "cores"), [("1", 8), ("2", 4), ("3", 2), ("16", 1)])
def test_local_processes_share_cores(monkeypatch: pytest.MonkeyPatch, processes: str, cores: int) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert num_cores() == cores


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 3), ("1600000 100000", 8)]
)
def test_cgroup_v2_quota(eight_cores: Path, quota: str, cores: int) -> None:
    (eight_cores / "cpu.max").write_text(quota + "\n")
    assert num_cores() == cores


@pytest.mark.parametrize(("quota_us", "cores"), [("-1", 8), ("400000", 4), ("50000", 1)])
def test_cgroup_v1_quota(eight_cores: Path, quota_us: str, cores: int) -> None:
    (eight_cores / "cpu").mkdir()
    (eight_cores / "cpu" / "cpu.cfs_quota_us").write_text(quota_us + "\n")
    (eight_cores / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_cores() == cores


def test_variable_overrides_all(monkeypatch: pytest.MonkeyPatch, eight_cores: Path) -> None:
    (eight_cores / "cpu.max").write_text("200000 100000")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(NUM_CORES_VARIABLE, "5")
    assert num_cores() == 5


@pytest.mark.parametrize("value", ["0", "-1", "all", ""])
def test_invalid_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(NUM_CORES_VARIABLE, value)
    with pytest.raises(ConfigError, match=f"{NUM_CORES_VARIABLE} must be a number of cores"):
        num_cores()


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4),
        ({"MPI_LOCALNRANKS": "4"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8"}, 4),
        # Bound by srun to eight of sixteen cores.
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "16"}, 8),
        # torchrun within such a task: its processes share the task's cores.
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, 2),
    ],
    ids=str,
)
def test_processes_of_other_launchers_share_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], cores: int
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert num_cores() == cores
