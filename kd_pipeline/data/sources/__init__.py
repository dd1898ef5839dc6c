"""Where samples come from: image folders, file lists, arrays and CIFAR, all read through one protocol, `Source`."""

from kd_pipeline.data.sources.arrays import Arrays
from kd_pipeline.data.sources.base import Source, open_source
from kd_pipeline.data.sources.cifar import Cifar
from kd_pipeline.data.sources.file_list import FileList
from kd_pipeline.data.sources.image_folder import ImageFolder
from kd_pipeline.data.sources.labels import load_classes, save_classes

__all__ = ["Arrays", "Cifar", "FileList", "ImageFolder", "Source", "load_classes", "open_source", "save_classes"]
