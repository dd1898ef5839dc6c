"""Whole jobs, each of which takes a `Config`: one function behind each command."""

from typing import TYPE_CHECKING

from kd_pipeline._core.lazy import lazy_exports

if TYPE_CHECKING:
    from kd_pipeline.workflows._check import check as check
    from kd_pipeline.workflows._compare import compare_files as compare_files
    from kd_pipeline.workflows._distill import distill as distill
    from kd_pipeline.workflows._record import RecordSettings as RecordSettings
    from kd_pipeline.workflows._record import plan_recording as plan_recording
    from kd_pipeline.workflows._record import record as record
    from kd_pipeline.workflows._train import train as train
    from kd_pipeline.workflows.demo import run_demo as run_demo
    from kd_pipeline.workflows.doctor import diagnose as diagnose
    from kd_pipeline.workflows.reporting.report import write_report as write_report
    from kd_pipeline.workflows.verification.verify import VerifySettings as VerifySettings
    from kd_pipeline.workflows.verification.verify import verify as verify

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "kd_pipeline.workflows._check": ["check"],
        "kd_pipeline.workflows._compare": ["compare_files"],
        "kd_pipeline.workflows._distill": ["distill"],
        "kd_pipeline.workflows._record": ["RecordSettings", "plan_recording", "record"],
        "kd_pipeline.workflows.reporting.report": ["write_report"],
        "kd_pipeline.workflows._train": ["train"],
        "kd_pipeline.workflows.verification.verify": ["VerifySettings", "verify"],
        "kd_pipeline.workflows.demo": ["run_demo"],
        "kd_pipeline.workflows.doctor": ["diagnose"],
    },
)
