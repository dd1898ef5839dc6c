"""Which samples exist: path or pixels, label, class names, fingerprint."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.sources.arrays import Arrays
from kd_pipeline.data.sources.cifar import Cifar
from kd_pipeline.data.sources.file_list import FileList
from kd_pipeline.data.sources.image_folder import ImageFolder
from kd_pipeline.data.sources.labels import class_names, load_classes, save_classes
from kd_pipeline.errors import DataError

__all__ = [
    "Arrays",
    "ArraysSettings",
    "Cifar",
    "Cifar10Settings",
    "Cifar100Settings",
    "FileList",
    "FileListSettings",
    "ImageFolder",
    "ImageFolderSettings",
    "Source",
    "SourceSettings",
    "load_classes",
    "open_source",
    "save_classes",
]


class ImageFolderSettings(Settings):
    """One folder per class, as torchvision's `ImageFolder` reads it."""

    kind: Literal["image_folder"] = "image_folder"
    root: Path
    """The folder that holds the class folders."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a JSON file that lists them; sorted folder names where left out."""
    labeled: bool = True
    """False: every image below `root`, without labels."""


class FileListSettings(Settings):
    """A `.csv` or `.jsonl` file with one path, and maybe a label, per line."""

    kind: Literal["file_list"] = "file_list"
    path: Path
    """The list."""
    root: Path | None = None
    """What relative paths in the list are relative to; the list's own folder where left out."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a JSON file that lists them; the sorted names in the list where left out."""


class ArraysSettings(Settings):
    """Images in an `.npy` or `.npz` file, labels beside them."""

    kind: Literal["arrays"] = "arrays"
    images: Path
    """uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`."""
    labels: Path | None = None
    """Integers `[N]`; left out, the array `labels` in the `.npz` file of the images, or no labels."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a JSON file that lists them."""


class Cifar10Settings(Settings):
    """CIFAR-10 as its authors publish it: the binary or the Python version, unpacked or still in its archive."""

    kind: Literal["cifar10"] = "cifar10"
    root: Path
    """The folder that has the files, the unpacked folder or the archive; or the archive itself."""
    split: Literal["train", "test"]
    download: bool = False
    """Fetch the archive into `root` where nothing of the dataset is there."""


class Cifar100Settings(Settings):
    """CIFAR-100, as `Cifar10Settings` has CIFAR-10."""

    kind: Literal["cifar100"] = "cifar100"
    root: Path
    """The folder that has the files, the unpacked folder or the archive; or the archive itself."""
    split: Literal["train", "test"]
    labels: Literal["fine", "coarse"] = "fine"
    """The 100 classes, or the 20 groups of five that they form."""
    download: bool = False
    """Fetch the archive into `root` where nothing of the dataset is there."""


AnySourceSettings = ImageFolderSettings | FileListSettings | ArraysSettings | Cifar10Settings | Cifar100Settings
SourceSettings = Annotated[AnySourceSettings, Field(discriminator="kind")]


class Source(Protocol):
    """Samples in a fixed order, read by position.

    The laws:

    - Two sources over the same data agree in order, labels, classes and fingerprint.
    - A source says which images there are; whether one can be decoded is for the loader to find out.
    - Nothing ever writes to the user's data.
    """

    labels: NDArray[np.int64] | None
    """`[N]` int64 class indices from 0 to `num_classes - 1`, or None for unlabeled samples."""
    classes: tuple[str, ...] | None
    """Class names in label order, or None where nobody gave any."""
    num_classes: int | None
    """`len(classes)`, else the largest label + 1, else None."""
    stores: Literal["files", "pixels"]
    """What `read` returns."""
    reports: tuple[str, ...]
    """What was skipped or looks odd, a sentence each; each was also logged as a warning."""

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The samples at `indices` `[n]` int64, each from 0 to N - 1, in a fresh array.

        Files: `[n, L]` uint8, absolute paths in the file system's encoding, NUL-padded to the longest of the batch.
        Pixels: `[n, H, W, 3]` uint8; a gray image is repeated in the three channels.
        """

    def name(self, index: int) -> str:
        """The sample as messages name it: its path, or `images.npy[17]`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the content, computed when first asked for.

        It covers class names, labels, relative paths, file sizes, and the bytes of every k-th sample with
        k = ceil(total bytes / 64 MiB): small data is hashed whole and large data sampled evenly, because reading a
        terabyte before a run would cost more than it finds. So are the sizes of more than 262,144 files. It depends
        neither on where the data lies nor on file times. A file that is missing or unreadable counts as one of size -1.
        """


def open_source(settings: AnySourceSettings, *, classes: Sequence[str] | None = None) -> Source:
    """Open what `settings` describe; `classes` is the training mapping, which validation data must fit.

    Raises:
        DataError: the data is not there or not what it claims to be, or its own `classes` are not the training mapping.
    """
    if isinstance(settings, Cifar10Settings | Cifar100Settings):
        cifar = Cifar(settings.kind, **settings.model_dump(exclude={"kind"}))
        _check_mapping(cifar.classes, classes, "take the same dataset and kind of labels for both")
        return cifar
    names = classes if settings.classes is None else class_names(settings.classes)
    _check_mapping(names, classes, "leave out `classes` to take the training data's")
    match settings:
        case ImageFolderSettings():
            return ImageFolder(settings.root, classes=names, labeled=settings.labeled)
        case FileListSettings():
            return FileList(settings.path, root=settings.root, classes=names)
        case ArraysSettings():
            return Arrays(settings.images, settings.labels, classes=names)


def _check_mapping(names: Sequence[str] | None, training: Sequence[str] | None, advice: str) -> None:
    if names is None or training is None:
        return
    for label, (here, there) in enumerate(zip_longest(names, training)):
        if here != there:
            raise DataError(
                f"class {label} is {here!r} in this source and {there!r} in the training data ({len(names)} and "
                f"{len(training)} classes); {advice}"
            )
