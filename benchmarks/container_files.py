"""Write the images of class folders into tar shards, Parquet files, MDS and litdata's chunks, several links to each."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.data.sources import ImageFolder

__all__ = ["WRITERS", "Images", "read_images", "write_litdata", "write_mds", "write_parquet", "write_tar"]

_ROW_GROUP = 100
"""Rows of Parquet files that are stored together: what the Hugging Face Hub recommends for images."""


@dataclass(frozen=True, slots=True)
class Images:
    """Encoded images and what their shards are to be."""

    content: Sequence[bytes]
    labels: Sequence[int]
    classes: Sequence[str]
    num_shards: int
    """Of different images, as even as the format allows."""
    num_links: int
    """How often each shard is in the dataset: a link costs no memory, but is another file for caches of whole files, as
    if the dataset were this much larger."""

    @property
    def names(self) -> list[str]:
        """Names without extension of all shards, of which the first `num_shards` are files."""
        return [f"{number:05}" for number in range(self.num_shards * self.num_links)]

    def shards(self) -> Iterator[tuple[str, range]]:
        """Name and samples of each shard that is a file."""
        for number, name in enumerate(self.names[: self.num_shards]):
            first, end = (len(self.content) * bound // self.num_shards for bound in (number, number + 1))
            yield name, range(first, end)


def read_images(root: Path, *, num_shards: int, num_links: int) -> Images:
    """Read all images in class folders."""
    source = ImageFolder(root)
    content = [Path(source.name(index)).read_bytes() for index in range(len(source))]
    assert source.labels is not None and source.classes is not None
    return Images(content, source.labels.tolist(), source.classes, num_shards, num_links)


def write_tar(images: Images, folder: Path) -> None:
    """Write tar shards as webdataset does, with `.jpg` and `.cls`."""
    for name, samples in images.shards():
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for sample in samples:
                for end, content in (("jpg", images.content[sample]), ("cls", b"%d" % images.labels[sample])):
                    member = tarfile.TarInfo(f"{sample:06}.{end}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    _link(images, folder, "tar")


def write_parquet(images: Images, folder: Path) -> None:
    """Write Parquet files as `datasets` does, with its compression, row groups and description of the columns."""
    arrow, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": list(images.classes), "_type": "ClassLabel"}}
    schema = arrow.schema(
        {"image": arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}), "label": arrow.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for name, samples in images.shards():
        columns = {
            "image": [{"bytes": images.content[sample], "path": f"{sample:06}.jpg"} for sample in samples],
            "label": [images.labels[sample] for sample in samples],
        }
        table = arrow.table(columns, schema)
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=_ROW_GROUP)
    _link(images, folder, "parquet")


def write_mds(images: Images, folder: Path) -> None:
    """Write the format of mosaicml-streaming."""
    streaming = require("streaming", extra="bench")
    size = _shard_bytes(images)
    with streaming.MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit=size) as writer:
        for content, label in zip(images.content, images.labels, strict=True):
            writer.write({"image": content, "label": label})

    def linked(shard: Any, link: str) -> Any:
        return shard | {"raw_data": shard["raw_data"] | {"basename": link}}

    _repeat(images, folder, "shards", linked, lambda shard: shard["raw_data"]["basename"])


def write_litdata(images: Images, folder: Path) -> None:
    """Write the format of litdata."""
    litdata = require("litdata.streaming", extra="bench")
    cache = litdata.Cache(str(folder), chunk_bytes=_shard_bytes(images))
    for index, (content, label) in enumerate(zip(images.content, images.labels, strict=True)):
        cache[index] = {"image": content, "label": label}
    cache.done()
    cache.merge()
    _repeat(images, folder, "chunks", lambda chunk, link: chunk | {"filename": link}, lambda chunk: chunk["filename"])


WRITERS: dict[str, Callable[[Images, Path], None]] = {
    "tar": write_tar,
    "parquet": write_parquet,
    "mds": write_mds,
    "litdata": write_litdata,
}
"""By the name of the folder that each fills."""


def _shard_bytes(images: Images) -> int:
    """Limit of the bytes in a shard for writers that take no number of images."""
    return int(1.02 * sum(map(len, images.content)) / images.num_shards) + 2**14


def _link(images: Images, folder: Path, end: str) -> None:
    for number, name in enumerate(images.names[images.num_shards :]):
        (folder / f"{name}.{end}").symlink_to(f"{images.names[number % images.num_shards]}.{end}")


def _repeat(
    images: Images, folder: Path, key: str, linked: Callable[[Any, str], Any], name_of: Callable[[Any], str]
) -> None:
    """Link to the shards of an index file as often as `images` says, and enter the links into the index."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    shards = list(index[key])
    for number in range(1, images.num_links):
        for shard in shards:
            link = f"{number:03}-{name_of(shard)}"
            (folder / link).symlink_to(name_of(shard))
            index[key].append(linked(shard, link))
    path.write_text(json.dumps(index))
