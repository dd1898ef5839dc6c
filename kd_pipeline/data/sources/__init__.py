"""Where samples come from: folders, lists, tar shards, arrays, CIFAR, noise and the user's own, behind one protocol."""

from kd_pipeline.data.sources.base import Source, open_source
from kd_pipeline.data.sources.custom import BaseSource
from kd_pipeline.data.sources.files.file_list import FileList
from kd_pipeline.data.sources.files.image_folder import ImageFolder
from kd_pipeline.data.sources.labels import load_classes, save_classes
from kd_pipeline.data.sources.masks.masks import Masks, masks_of
from kd_pipeline.data.sources.masks.settings import (
    ArrayMasks,
    FolderMasks,
    ListMasks,
    MaskSettings,
    TableMasks,
    TarMasks,
)
from kd_pipeline.data.sources.pixels.arrays import Arrays
from kd_pipeline.data.sources.pixels.cifar import Cifar
from kd_pipeline.data.sources.pixels.noise import Noise
from kd_pipeline.data.sources.tables.huggingface import HuggingFace
from kd_pipeline.data.sources.tables.parquet import Parquet
from kd_pipeline.data.sources.tar.source import Tar

__all__ = [
    "ArrayMasks",
    "Arrays",
    "BaseSource",
    "Cifar",
    "FileList",
    "FolderMasks",
    "HuggingFace",
    "ImageFolder",
    "ListMasks",
    "MaskSettings",
    "Masks",
    "Noise",
    "Parquet",
    "Source",
    "TableMasks",
    "Tar",
    "TarMasks",
    "load_classes",
    "masks_of",
    "open_source",
    "save_classes",
]
