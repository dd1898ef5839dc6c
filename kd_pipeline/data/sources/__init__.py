"""Where samples come from: folders of images, lists of files, arrays, CIFAR."""

from kd_pipeline.data.sources.arrays import Arrays
from kd_pipeline.data.sources.base import Source, open_source
from kd_pipeline.data.sources.cifar import Cifar
from kd_pipeline.data.sources.file_list import FileList
from kd_pipeline.data.sources.image_folder import ImageFolder

__all__ = ["Arrays", "Cifar", "FileList", "ImageFolder", "Source", "open_source"]
