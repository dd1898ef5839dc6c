"""The same images as files, in shards and tables, on a disk and behind URLs: the same stream, resumed anywhere and on
any number of ranks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kd_pipeline import ShardShuffle
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import FileList, HuggingFace, ImageFolder, Parquet, Source, Tar
from kd_pipeline.loader.loader import KDDataLoader
from tests.data.sources.table_files import dataset_of, table_of, write_parquet
from tests.http_server import serve_folder
from tests.s3_server import serve_s3
from tests.streams import TRAIN, Fields, assert_same, conv_teacher, global_rows, run, state_after
from tests.tar_files import folder_as_shards

PER_SHARD = 12
"""Images in a tar shard, and in a Parquet file."""
IN_SHARDS = ShardShuffle(buffer=10)


class Places(NamedTuple):
    """Where the images are, in every form."""

    photos: Path
    local: Path
    """The folder of `tars` and `tables`."""
    http: str
    s3: str
    names: tuple[str, ...]


@pytest.fixture(scope="module")
def places(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    local = tmp_path_factory.mktemp("containers")
    for folder in ("tars", "tables"):
        (local / folder).mkdir()
    folder_as_shards(photo_folder, local / "tars", per_shard=PER_SHARD)
    files = ImageFolder(photo_folder)
    write_parquet(table_of(files), local / "tables")
    (local / "photos").symlink_to(photo_folder)
    with serve_folder(local) as web, serve_s3() as s3:
        for path in [*local.glob("t*/*"), *photo_folder.rglob("*.*")]:
            inside = path.relative_to(local) if path.is_relative_to(local) else path.relative_to(photo_folder)
            s3.put(str(inside if path.is_relative_to(local) else Path("photos", inside)), path.read_bytes())
        yield Places(photo_folder, local, web.url, "s3://bucket", files.classes or ())


def urls(places: Places) -> Source:
    """A list whose rows are URLs."""
    files = sorted(places.photos.glob("*/*"))
    rows = [f"{places.http}/photos/{path.parent.name}/{path.name},{path.parent.name}" for path in files]
    path = places.local / "urls.csv"
    path.write_text("\n".join(["path,label", *rows]))
    return FileList(path)


def tar(place: str, names: tuple[str, ...]) -> Source:
    return Tar(f"{place}/tars/train-{{0000..0003}}.tar", classes=names)


def parquet(place: str, names: tuple[str, ...]) -> Source:
    return Parquet(f"{place}/tables/train-{{00000..00002}}-of-00003.parquet", classes=names)


def dataset(places: Places) -> Source:
    images, folder = ImageFolder(places.photos), places.local / "dataset"
    if not folder.exists():
        dataset_of(images).save_to_disk(folder, num_shards=3)
    return HuggingFace(folder)


CONTAINERS: dict[str, Callable[[Places], Source]] = {
    "list of urls": urls,
    "folder on s3": lambda places: ImageFolder(f"{places.s3}/photos"),
    "huggingface": dataset,
    "tar": lambda places: tar(str(places.local), places.names),
    "parquet": lambda places: parquet(str(places.local), places.names),
    "tar over http": lambda places: tar(places.http, places.names),
    "parquet over http": lambda places: parquet(places.http, places.names),
    "tar on s3": lambda places: tar(places.s3, places.names),
    "parquet on s3": lambda places: parquet(places.s3, places.names),
}
every_container = pytest.mark.parametrize("container", CONTAINERS)
pytestmark = pytest.mark.slow


def load(source: Source, **options: object) -> KDDataLoader:
    return KDDataLoader(source, TRAIN, conv_teacher(), **{"batch_size": 8, "seed": 5, **options})  # type: ignore[arg-type]


def stream(source: Source, **options: object) -> list[Fields]:
    with load(source, **options) as loader:
        return run(loader, 2)


@pytest.fixture(scope="module")
def wanted(photo_folder: Path) -> list[Fields]:
    """The stream of the folder."""
    return stream(ImageFolder(photo_folder))


@every_container
def test_same_stream_resumed_at_every_batch(places: Places, wanted: list[Fields], container: str) -> None:
    source = CONTAINERS[container](places)
    # A request of each image is slow with this server, and shards there are resumed at every batch.
    step = 4 if container == "folder on s3" else 1
    for number in range(0, len(wanted) // 2 + 1, step):
        with load(source) as loader:
            state = state_after(loader, number) if number else loader.state_dict()
        with load(source) as loader:
            loader.load_state_dict(state)
            assert_same(run(loader, 2), wanted[number:])


@every_container
def test_ranks_see_what_one_process_sees(places: Places, container: str) -> None:
    """Also where shards stay together."""
    source = CONTAINERS[container](places)
    in_shards = getattr(source, "shard_ends", None) is not None
    options = {"last_batch": "drop", "shuffle": IN_SHARDS if in_shards else True}
    sizes = (1, 4) if container == "folder on s3" else (1, 2, 4)
    one, *others = (
        global_rows([stream(source, batch_size=8 // size, shard=Shard(rank, size), **options) for rank in range(size)])
        for size in sizes
    )
    for ranks in others:
        assert_same(ranks, one)
    seen = [int(row["index"]) for row in one]
    assert len(set(seen[: len(seen) // 2])) == len(seen) // 2 == 32
