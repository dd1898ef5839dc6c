"""Parquet files and Hugging Face datasets with the images of a folder, as their usual writers make them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_pipeline.data.sources import Source


def contents(source: Source) -> list[bytes]:
    """The files of a source of files."""
    return [Path(source.name(index)).read_bytes() for index in range(len(source))]


def read_all(source: Source) -> list[bytes]:
    """The images of a source of bytes."""
    return [image.tobytes() for image in source.read(np.arange(len(source)))]


def table_of(files: Source, kind: str = "struct", *, label: str = "label") -> pa.Table:
    """The images and labels of a source of files; `kind` is how the images are stored."""
    images: Any = contents(files)
    if kind == "struct":
        images = pa.array(
            [{"bytes": image, "path": Path(files.name(row)).name} for row, image in enumerate(images)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    elif kind == "dictionary":
        images = pa.array(images, pa.binary()).dictionary_encode()
    else:
        images = pa.array(images, {"binary": pa.binary(), "large_binary": pa.large_binary()}[kind])
    return pa.table({"image": images, label: pa.array(files.labels)})


def write_parquet(
    table: pa.Table, folder: Path, *, num_files: int = 3, row_group_size: int = 4, **options: Any
) -> Path:
    """`table` in files of about equal length, as they are called on Hugging Face."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.linspace(0, len(table), num_files + 1).astype(int).tolist()
    for number, (start, end) in enumerate(pairwise(ends)):
        path = folder / f"train-{number:05}-of-{num_files:05}.parquet"
        pq.write_table(table.slice(start, end - start), path, row_group_size=row_group_size, **options)
    return folder


def dataset_of(files: Source, **features: Any) -> datasets.Dataset:
    """The images and labels of a source of files; `features` replace or add to those of its columns."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(files.classes or ())), **features}
    images = [{"bytes": image, "path": Path(files.name(row)).name} for row, image in enumerate(contents(files))]
    columns = {"image": images, "label": np.asarray(files.labels).tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
