"""Measurements that a user can repeat: what the library is compared with, how, and what came out."""

from kd_pipeline.bench.loaders import BenchLoaderSettings, bench_loader
from kd_pipeline.bench.measure import BenchResult

__all__ = ["BenchLoaderSettings", "BenchResult", "bench_loader"]
