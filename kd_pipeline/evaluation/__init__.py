"""How good a teacher or a student is."""

from kd_pipeline.evaluation._compare import compare
from kd_pipeline.evaluation._evaluate import evaluate
from kd_pipeline.evaluation._predict import predict

__all__ = ["compare", "evaluate", "predict"]
