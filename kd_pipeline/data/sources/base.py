"""Settings of every kind of source, the protocol that sources implement, and `open_source` from one to the other."""

from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from kd_pipeline._core.image_size import Size, height_width
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.sources.custom import open_custom
from kd_pipeline.data.sources.encoded import Encoded
from kd_pipeline.data.sources.files.file_list import FileList
from kd_pipeline.data.sources.files.image_folder import ImageFolder
from kd_pipeline.data.sources.labels import class_names
from kd_pipeline.data.sources.masks.masks import Masks
from kd_pipeline.data.sources.masks.settings import ArrayMasks, FolderMasks, ListMasks, TableMasks, TarMasks
from kd_pipeline.data.sources.pixels.arrays import Arrays
from kd_pipeline.data.sources.pixels.cifar import Cifar
from kd_pipeline.data.sources.pixels.noise import Noise
from kd_pipeline.data.sources.tables.huggingface import HuggingFace
from kd_pipeline.data.sources.tables.parquet import Parquet
from kd_pipeline.data.sources.tar.source import Tar
from kd_pipeline.errors import DataError
from kd_pipeline.storage import Location, StoreSettings
from kd_pipeline.storage.base import parse_size

__all__ = [
    "ArraysSettings",
    "Cifar10Settings",
    "Cifar100Settings",
    "CustomSettings",
    "Encoded",
    "FileListSettings",
    "HuggingFaceSettings",
    "ImageFolderSettings",
    "NoiseSettings",
    "ParquetSettings",
    "Source",
    "SourceSettings",
    "TarSettings",
    "open_source",
]


class ImageFolderSettings(Settings):
    """One folder per class, in the layout of torchvision's `ImageFolder`."""

    kind: Literal["image_folder"] = "image_folder"
    root: Location
    """The folder that contains the class folders; a local path, or a URL of a store that lists its files (`s3://`,
    `gs://`, `hf://`)."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a file with them: a JSON list, a JSON object such as `class_to_idx` or `id2label`,
    or a `.txt` file with a name per line; defaults to the sorted folder names."""
    labeled: bool = True
    """False: every image below `root`, without labels. So it is with `masks`, too."""
    masks: FolderMasks | None = None
    """Where the masks of the images are; `classes` are those of their pixels then."""
    storage: StoreSettings = Field(default_factory=StoreSettings)
    """How URLs are read."""


class FileListSettings(Settings):
    """A CSV or JSONL file with one path or URL, and optionally a label, per line."""

    kind: Literal["file_list"] = "file_list"
    path: Location
    """The list, by its path or URL: text with commas, tabs, semicolons, `|` or spaces between its columns, or an object
    of JSON per line. A first line with names such as `path,label` or `filename,class` says which columns are read."""
    root: Location | None = None
    """Base of the relative paths in the list, a folder or a URL; defaults to the list's own folder."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a file with them, as for an image folder; defaults to the sorted names in the
    list."""
    masks: ListMasks | None = None
    """Which column has the paths of masks; labels are not read then, and `classes` are those of the pixels."""
    storage: StoreSettings = Field(default_factory=StoreSettings)
    """How URLs are read."""


class TarSettings(Settings):
    """Images in tar archives, such as the shards of WebDataset, read in place."""

    kind: Literal["tar"] = "tar"
    path: Location | tuple[Location, ...]
    """A shard, a glob, a range such as `train-{0000..0146}.tar`, WebDataset's list of shards in JSON, or a list of
    these; local paths or URLs."""
    image: str | tuple[str, ...] | None = None
    """Extension of the images, or several of which the first is taken that a sample has; defaults to all known ones."""
    label: str = Field(default="auto", pattern=r"^[^:\s/]+(:.+)?$")
    """Where the labels are: `cls`, `txt` or another extension of the file with the label, `json:KEY`, `folder`, or
    `none`. `auto` is `cls` if there are such files, and an error if there is something else that might be a label."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a file with them, as for an image folder; defaults to the sorted names, if labels
    are names."""
    masks: TarMasks | None = None
    """Which extension the masks have; labels are not read then, and `classes` are those of the pixels."""
    index: Literal["cache", "beside"] = "cache"
    """Keep where the images are in the user's cache, or also write DALI's index files beside the shards."""
    storage: StoreSettings = Field(default_factory=StoreSettings)
    """How URLs are read."""


class ArraysSettings(Settings):
    """Images, and optionally labels, in `.npy` or `.npz` files."""

    kind: Literal["arrays"] = "arrays"
    images: Path
    """uint8 `[N, H, W]`, `[N, H, W, 1]` or `[N, H, W, 3]`."""
    labels: Path | None = None
    """Integers `[N]`; defaults to the array `labels` in the `.npz` file of the images, else to no labels."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a file with them, as for an image folder."""
    masks: ArrayMasks | None = None
    """Where the masks of the images are, in place of labels; `classes` are those of their pixels then."""


class _CifarSettings(Settings):
    kind: Literal["cifar10", "cifar100"]
    root: Path
    """The folder with the files, with the unpacked folder or with the archive; or the archive itself."""
    split: Literal["train", "test"]
    """Which of the two parts of the dataset to read."""
    download: bool = False
    """Download the archive into `root` if the dataset is not there."""


class Cifar10Settings(_CifarSettings):
    """CIFAR-10 as its authors publish it: binary or Python version, unpacked or still in its archive."""

    kind: Literal["cifar10"] = "cifar10"


class Cifar100Settings(_CifarSettings):
    """CIFAR-100 as its authors publish it: binary or Python version, unpacked or still in its archive."""

    kind: Literal["cifar100"] = "cifar100"
    labels: Literal["fine", "coarse"] = "fine"
    """The 100 classes, or the 20 superclasses of five each."""


class NoiseSettings(Settings):
    """Images of random pixels, for measurements without data or for distillation from noise."""

    kind: Literal["noise"] = "noise"
    num_images: int = Field(gt=0)
    """How many; they take no memory and no disk."""
    size: Size
    """Height and width in pixels: `256` for a square, or `[384, 640]`."""
    num_classes: int | None = Field(default=None, gt=0)
    """Each image has a random label below it; defaults to no labels."""
    seed: int = Field(default=0, ge=0)
    """Of pixels and labels; give training and validation different ones."""


class _TableSettings(Settings):
    image_column: str | None = None
    """The column of encoded images; defaults to the one that Hugging Face's metadata says, or the only one of bytes."""
    label_column: str | None = None
    """The column of class indices or names; defaults to the one that Hugging Face's metadata says, or else `label`,
    `labels` or `cls`. Without such a column there are no labels."""
    labeled: bool = True
    """False reads no labels."""
    classes: tuple[str, ...] | Path | None = None
    """Class names in label order, or a file with them, as for an image folder; defaults to those in Hugging Face's
    metadata, or to the sorted names in the column."""
    masks: TableMasks | None = None
    """Which column has the masks; labels are not read then, and `classes` are those of the pixels."""


class ParquetSettings(_TableSettings):
    """Parquet files with encoded images in a column, such as those of a dataset on Hugging Face."""

    kind: Literal["parquet"] = "parquet"
    path: Location | tuple[Location, ...]
    """A file, a glob, a range such as `train-{00000..00004}.parquet`, a folder, or a list of these; also URLs."""
    split: str | None = None
    """Which split of a folder, such as train; not needed if there is one."""
    memory: int | str = "1 GB"
    """Bytes of decoded row groups that are kept, such as 500 MB or 4 GB."""
    storage: StoreSettings = Field(default_factory=StoreSettings)
    """How URLs are read."""

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, memory: int | str) -> int | str:
        parse_size(memory)
        return memory


class HuggingFaceSettings(_TableSettings):
    """A dataset that Hugging Face's `datasets` opens, read from its Arrow files."""

    kind: Literal["huggingface"] = "huggingface"
    path: str
    """A folder of `Dataset.save_to_disk` or of a dataset repository, or the name of a repository such as
    `me/flowers`, which `datasets` downloads."""
    name: str | None = None
    """Which configuration of the dataset, if it has several."""
    split: str | None = None
    """Such as `train` or `train[:10%]`; not needed if there is one."""
    revision: str | None = None
    """Commit, tag or branch of a repository on the Hub."""


class CustomSettings(Settings):
    """A source of your own, which a function returns; its module is allowed by `--plugin`."""

    kind: Literal["custom"] = "custom"
    factory: str = Field(pattern=r"^\w+(\.\w+)*:\w+$")
    """The function, as `package.module:function`. It returns a `Source`, such as a `BaseSource`. If it has an argument
    `classes`, it gets the class names of the training data in label order, or None for the training data itself."""
    kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Arguments of the function."""


AnySourceSettings = (
    ImageFolderSettings
    | FileListSettings
    | TarSettings
    | ParquetSettings
    | HuggingFaceSettings
    | ArraysSettings
    | Cifar10Settings
    | Cifar100Settings
    | NoiseSettings
    | CustomSettings
)
SourceSettings = Annotated[AnySourceSettings, Field(discriminator="kind")]


class Source(Protocol):
    """A dataset: N samples in a fixed order, read by position.

    The contract:

    1. Two sources over the same data agree in order, labels, classes and fingerprint.
    2. A source lists images but never decodes them. Finding the unreadable ones is the loader's job.
    3. A source never changes the user's data. It writes beside it only what the user asks for.
    4. What is wrong with the data as a whole raises `DataError` from the constructor; what is only suspicious becomes
       one of `warnings`.
    """

    labels: NDArray[np.int64] | None
    """`[N]` int64 class indices from 0 to `num_classes - 1`; None for unlabeled samples."""
    classes: tuple[str, ...] | None
    """Class names in label order; None if there are none."""
    num_classes: int | None
    """`len(classes)`, else that of the masks or the largest label + 1, else None."""
    masks: Masks | None
    """The class of each pixel of each image, whose classes those of the source are then; None without masks. Sources of
    your own may lack it."""
    warnings: tuple[str, ...]
    """What was skipped or looks suspicious, a sentence each; each one is also logged."""

    def __len__(self) -> int: ...

    @property
    def stores(self) -> Literal["files", "bytes", "pixels"]:
        """What `read` returns."""

    def read(self, indices: NDArray[np.int64]) -> Any:
        """The samples at `indices` `[n]` int64, each from 0 to N - 1.

        Files: `[n, L]` uint8, absolute paths in the file system's encoding, NUL-padded to the longest of the batch.
        Pixels: `[n, H, W, 3]` uint8; the channel of a grayscale image is repeated.
        Bytes: `Encoded`, n arrays `[L]` uint8 with what would be in the files; they may be views, and read-only. A
        sample that has no bytes, today and tomorrow, has an `UnreadableFileError` in its place, which says why. Threads
        call this at the same time, for other batches.

        Raises:
            StorageError: a store did not give the bytes, so the sample is not to blame; of bytes only.
        """

    def name(self, index: int) -> str:
        """The sample's name in messages: its path, or `images.npy[17]`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the content, computed on first access.

        It covers class names, labels, relative paths, file sizes, and the bytes of every k-th sample with
        k = ceil(total bytes / 64 MiB): small data is hashed completely and large data sampled evenly, because reading
        a terabyte before a run would cost more than it finds. For the same reason it covers the first 64 MiB of a file,
        and of more than 262,144 files the sizes, of as many tiny images in an array the pixels, are sampled further. It
        depends neither on the location of the data nor on file times. A missing or unreadable file counts as size -1.
        """


def open_source(
    settings: AnySourceSettings, *, classes: Sequence[str] | None = None, plugins: Collection[str] = ()
) -> Source:
    """Open the source that `settings` describe.

    Args:
        settings: the kind of source and where its data is.
        classes: class names of the training data in label order, which validation data must share.
        plugins: modules that the factory of a `custom` source may come from. A config file is data and cannot grant
            this itself: pass what the user typed.

    Raises:
        ConfigError: the factory of a `custom` source is not allowed, or not there.
        DataError: the data is missing or malformed, or its own `classes` differ from those of the training data.
    """
    if isinstance(settings, CustomSettings):
        return _open_custom(settings, classes, plugins)
    if isinstance(settings, Cifar10Settings | Cifar100Settings):
        cifar = Cifar(settings.kind, **settings.model_dump(exclude={"kind"}))
        _check_same_classes(cifar.classes, classes, "take the same dataset and kind of labels for both")
        return cifar
    if isinstance(settings, NoiseSettings):
        number, seed = settings.num_classes, settings.seed
        if classes is not None and number not in (None, len(classes)):
            raise DataError(
                f"noise: num_classes is {number}, and the training data has {len(classes)} classes; set that"
            )
        return Noise(settings.num_images, height_width(settings.size), num_classes=number, classes=classes, seed=seed)
    names = classes if settings.classes is None else class_names(settings.classes)
    _check_same_classes(names, classes, "leave out `classes` to take the training data's")
    match settings:
        case ImageFolderSettings():
            labeled, masks, storage = settings.labeled, settings.masks, settings.storage
            return ImageFolder(settings.root, classes=names, labeled=labeled, masks=masks, storage=storage)
        case FileListSettings():
            root, storage = settings.root, settings.storage
            return FileList(settings.path, root=root, classes=names, masks=settings.masks, storage=storage)
        case TarSettings():
            own = settings.model_dump(include={"image", "label", "index"})
            return Tar(settings.path, classes=names, masks=settings.masks, storage=settings.storage, **own)
        case ParquetSettings():
            options = settings.model_dump(include={"split", "image_column", "label_column", "labeled"})
            options |= {"masks": settings.masks, "memory": parse_size(settings.memory)}
            return Parquet(settings.path, classes=names, storage=settings.storage, **options)
        case HuggingFaceSettings():
            options = settings.model_dump(exclude={"kind", "classes", "masks"})
            return HuggingFace(classes=names, masks=settings.masks, **options)
        case ArraysSettings():
            return Arrays(settings.images, settings.labels, classes=names, masks=settings.masks)


def _open_custom(settings: CustomSettings, classes: Sequence[str] | None, plugins: Collection[str]) -> Source:
    source = open_custom(settings.factory, settings.kwargs, classes=classes, plugins=plugins)
    advice = f"let {settings.factory} take an argument `classes`, which are the training data's, and number labels so"
    if source.classes is None and source.labels is not None and classes is not None:
        raise DataError(
            f"{settings.factory}: the training data has names of its classes, and this source none; {advice}"
        )
    _check_same_classes(source.classes, classes, advice)
    return source


def _check_same_classes(names: Sequence[str] | None, training: Sequence[str] | None, advice: str) -> None:
    if names is None or training is None:
        return
    for label, (here, there) in enumerate(zip_longest(names, training)):
        if here != there:
            raise DataError(
                f"class {label} is {here!r} in this source and {there!r} in the training data ({len(names)} and "
                f"{len(training)} classes); {advice}"
            )
