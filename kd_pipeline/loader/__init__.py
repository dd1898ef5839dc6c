"""`KDDataLoader` and `BatchLoader`: batches of images or of anything else, with the teacher's outputs for them."""

from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.loader.loader import KDDataLoader

__all__ = ["AnyLoader", "BatchLoader", "KDDataLoader"]
