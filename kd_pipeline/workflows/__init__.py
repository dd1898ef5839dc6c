"""Whole jobs, each of which takes a `Config`: one function behind each command."""

from typing import TYPE_CHECKING

from kd_pipeline._core.lazy import lazy_exports

if TYPE_CHECKING:
    from kd_pipeline.workflows._check import check
    from kd_pipeline.workflows._record import record
    from kd_pipeline.workflows._train import train
    from kd_pipeline.workflows.demo import run_demo
    from kd_pipeline.workflows.doctor import diagnose

__all__ = ["check", "diagnose", "record", "run_demo", "train"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "check": "kd_pipeline.workflows._check",
        "diagnose": "kd_pipeline.workflows.doctor",
        "record": "kd_pipeline.workflows._record",
        "run_demo": "kd_pipeline.workflows.demo",
        "train": "kd_pipeline.workflows._train",
    },
)
