"""`KDDataLoader`: batches of images with the teacher's outputs for them."""

from kd_pipeline.loader.loader import KDDataLoader

__all__ = ["KDDataLoader"]
