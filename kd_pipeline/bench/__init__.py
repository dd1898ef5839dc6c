"""Measurements that a user can repeat: what the library is compared with, how, and what came out."""

from kd_pipeline.bench.loaders import BenchLoaderSettings, bench_loader
from kd_pipeline.bench.measure import BenchResult
from kd_pipeline.bench.scale import BenchScaleSettings, bench_scale
from kd_pipeline.bench.teachers import BenchTeacherSettings, bench_teacher

__all__ = [
    "BenchLoaderSettings",
    "BenchResult",
    "BenchScaleSettings",
    "BenchTeacherSettings",
    "bench_loader",
    "bench_scale",
    "bench_teacher",
]
