"""Where samples come from: folders, lists, tar shards, arrays, CIFAR and the user's own, behind one protocol."""

from kd_pipeline.data.sources.arrays import Arrays
from kd_pipeline.data.sources.base import Source, open_source
from kd_pipeline.data.sources.cifar import Cifar
from kd_pipeline.data.sources.custom import BaseSource
from kd_pipeline.data.sources.file_list import FileList
from kd_pipeline.data.sources.huggingface import HuggingFace
from kd_pipeline.data.sources.image_folder import ImageFolder
from kd_pipeline.data.sources.labels import load_classes, save_classes
from kd_pipeline.data.sources.parquet import Parquet
from kd_pipeline.data.sources.tar import Tar

__all__ = [
    "Arrays",
    "BaseSource",
    "Cifar",
    "FileList",
    "HuggingFace",
    "ImageFolder",
    "Parquet",
    "Source",
    "Tar",
    "load_classes",
    "open_source",
    "save_classes",
]
