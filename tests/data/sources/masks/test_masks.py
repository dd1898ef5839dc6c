"""Every kind of source with masks gives the same masks, in the order of its images."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources import BaseSource, Masks, MaskSettings, open_source
from kd_pipeline.data.sources.base import (
    ArraysSettings,
    FileListSettings,
    HuggingFaceSettings,
    ImageFolderSettings,
    ParquetSettings,
    Source,
    TarSettings,
)
from tests.data.sources.helpers import error_of
from tests.mask_files import png_of, save_pair, some_masks
from tests.tar_files import write_tar

NUM = 6
NAMES = [f"{'ab'[number % 2]}/{number}" for number in range(NUM)]
RULES = {"num_classes": 4}


@pytest.fixture
def masks() -> list[np.ndarray]:
    return some_masks(NUM)


@pytest.fixture
def root(tmp_path, monkeypatch, masks) -> Path:
    """Images in `images`, their masks in `masks`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, mask in zip(NAMES, masks, strict=True):
        save_pair(tmp_path / "images", tmp_path / "masks", name, mask)
    return tmp_path


def folder(root: Path) -> ImageFolderSettings:
    return ImageFolderSettings(root=str(root / "images"), masks={"root": str(root / "masks"), **RULES})


def file_list(root: Path) -> FileListSettings:
    rows = [f"images/{name}.jpg,masks/{name}.png" for name in NAMES]
    (root / "list.csv").write_text("\n".join(["image,mask", *rows]))
    return FileListSettings(path=str(root / "list.csv"), masks=RULES)


def json_list(root: Path) -> FileListSettings:
    rows = [f'{{"path": "images/{name}.jpg", "label": "masks/{name}.png"}}' for name in NAMES]
    (root / "list.jsonl").write_text("\n".join(rows))
    return FileListSettings(path=str(root / "list.jsonl"), masks={"column": "label", **RULES})


def tar(root: Path) -> TarSettings:
    for shard in range(2):
        files = {}
        for name in NAMES[shard::2]:
            files[f"{name}.jpg"] = (root / f"images/{name}.jpg").read_bytes()
            files[f"{name}.seg.png"] = (root / f"masks/{name}.png").read_bytes()
        write_tar(root / f"{shard}.tar", files)
    return TarSettings(path=str(root / "{0..1}.tar"), masks={"extension": "seg.png", **RULES})


def columns(root: Path) -> dict[str, list[bytes]]:
    images = [(root / f"images/{name}.jpg").read_bytes() for name in NAMES]
    return {"image": images, "annotation": [(root / f"masks/{name}.png").read_bytes() for name in NAMES]}


def parquet(root: Path) -> ParquetSettings:
    pq.write_table(pa.table(columns(root)), root / "0.parquet", row_group_size=2)
    own = {"column": "annotation", **RULES}
    return ParquetSettings(path=str(root / "0.parquet"), image_column="image", masks=own)


def hugging_face(root: Path) -> HuggingFaceSettings:
    dataset = datasets.Dataset.from_dict(
        columns(root), features=datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    )
    dataset.save_to_disk(root / "saved")
    return HuggingFaceSettings(path=str(root / "saved"), image_column="image", masks={"column": "annotation", **RULES})


KINDS = [folder, file_list, json_list, tar, parquet, hugging_face]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_their_images(root, masks, kind):
    source = open_source(kind(root))
    assert (source.labels, source.classes, source.num_classes, len(source.masks)) == (None, None, 4, NUM)
    assert source.masks.ignore_index == 255 and "with masks" in repr(source)
    index = np.array([5, 0, 3, 3, 1])
    sizes = {(root / f"images/{name}.jpg").stat().st_size: number for number, name in enumerate(NAMES)}
    numbers = [sizes[len(image)] for image in contents_of(source, index)]
    for number, mask in zip(numbers, source.masks.read(index), strict=True):
        assert mask.dtype == np.uint8 and np.array_equal(mask, masks[number])


def contents_of(source: Source, index: np.ndarray) -> list[bytes]:
    if source.stores == "bytes":
        return [image.tobytes() for image in source.read(index)]
    return [Path(source.name(each)).read_bytes() for each in index.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_names_say_where_a_mask_is(root, kind):
    source = open_source(kind(root))
    stem = source.name(2).rpartition("/")[2].partition(".")[0]
    assert (stem in source.masks.name(2) and source.masks.name(2) != source.name(2)) or kind in (parquet, hugging_face)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_includes_the_masks(root, masks, kind):
    settings = kind(root)
    before = open_source(settings).fingerprint
    assert open_source(kind(root)).fingerprint == before
    mapped = settings.masks.model_copy(update={"values": (1, 0, 2, 3)})
    assert open_source(settings.model_copy(update={"masks": mapped})).fingerprint != before
    other = masks[3].copy()
    other[0, 0] = (other[0, 0] + 1) % 4
    (root / f"masks/{NAMES[3]}.png").write_bytes(png_of(other))
    shutil.rmtree(root / "saved", ignore_errors=True)
    assert open_source(kind(root)).fingerprint != before


def test_arrays_have_masks(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (5, 8, 9, 3), dtype=np.uint8))
    masks = rng.integers(0, 4, (5, 8, 9))
    np.save(tmp_path / "masks.npy", masks)
    np.savez(tmp_path / "masks.npz", masks=masks.astype(np.uint8), others=masks)
    for name in ("masks.npy", "masks.npz"):
        own = {"path": str(tmp_path / name), "num_classes": 4}
        settings = ArraysSettings(images=str(tmp_path / "images.npy"), masks=own)
        source = open_source(settings)
        found = source.masks.read(np.array([4, 0]))
        assert np.array_equal(found, masks[[4, 0]]) and found[0].dtype == np.uint8
        assert source.masks.name(4) == f"{tmp_path / name}[4]" and source.num_classes == 4
    np.save(tmp_path / "masks.npy", masks[:, :7])
    settings = ArraysSettings(
        images=str(tmp_path / "images.npy"), masks={"path": str(tmp_path / "masks.npy"), "num_classes": 4}
    )
    assert "expected masks [5, 8, 9] of integers" in error_of(open_source, settings)


def test_names_of_classes_are_those_of_the_pixels(root):
    settings = folder(root).model_copy(update={"classes": ("sky", "road", "car", "tree")})
    source = open_source(settings)
    assert source.classes == ("sky", "road", "car", "tree") and source.num_classes == 4
    assert "and the names in `classes` 2" in error_of(
        open_source, settings.model_copy(update={"classes": ("sky", "road")})
    )
    known = ImageFolderSettings(root=str(root / "images"), masks={"root": str(root / "masks")})
    assert open_source(known, classes=("a", "b", "c", "d")).num_classes == 4


def test_an_unreadable_mask_is_an_error_in_its_place(root):
    (root / f"masks/{NAMES[1]}.png").write_bytes(b"nothing")
    (root / f"masks/{NAMES[2]}.png").write_bytes(png_of(np.full((26, 34), 9)))
    source = open_source(folder(root))
    (root / f"masks/{NAMES[3]}.png").unlink()
    numbers = [int(Path(source.name(index)).stem) for index in range(NUM)]
    found = dict(zip(numbers, source.masks.read(np.arange(NUM)), strict=True))
    errors = {number: str(mask) for number, mask in found.items() if isinstance(mask, UnreadableFileError)}
    assert errors.keys() == {1, 2, 3}
    assert errors[1].startswith(f"its mask {root / 'masks' / NAMES[1]}.png: it is of a kind that starts with")
    assert "it has the value 9" in errors[2] and "No such file" in errors[3]
    assert "more than max_pixels=10" in str(source.masks.read(np.array([0]), max_pixels=10)[0])


def test_a_mask_has_the_size_of_its_image(root, masks):
    found = open_source(folder(root)).masks
    (mask,) = found.read(np.array([0]))
    found.require_size(0, mask.shape, (20, 30))
    with pytest.raises(UnreadableFileError, match="has 30x20 pixels, and the image 20x30"):
        found.require_size(0, mask.shape, (30, 20))


def test_sources_of_your_own_have_masks(root, masks):
    paths = [root / f"masks/{name}.png" for name in NAMES]
    own = Masks(BaseSource(paths), MaskSettings(num_classes=4))
    source = BaseSource([root / f"images/{name}.jpg" for name in NAMES], masks=own)
    assert source.num_classes == 4 and np.array_equal(source.masks.read(np.array([3]))[0], masks[3])
    subset = own.subset(np.array([5, 1])).subset(np.array([1]))
    assert len(subset) == 1 and np.array_equal(subset.read(np.array([0]))[0], masks[1])
    assert subset.name(0) == str(paths[1])
    images = [root / f"images/{name}.jpg" for name in NAMES[:3]]
    assert "6 masks for 3 samples" in error_of(BaseSource, images, masks=own)
    assert "exclude each other" in error_of(BaseSource, images, [0, 1, 2], masks=own.subset(np.arange(3)))


def test_a_shard_without_a_mask_is_an_error(root):
    files = {f"{name}.jpg": (root / f"images/{name}.jpg").read_bytes() for name in NAMES}
    settings = TarSettings(path=str(root / "a.tar"), masks={"extension": "seg.png", **RULES})
    write_tar(root / "a.tar", files)
    assert "no sample has a mask" in error_of(open_source, settings)
    write_tar(root / "a.tar", files | {"b/5.seg.png": png_of(np.zeros((2, 2)))})
    message = error_of(open_source, settings)
    assert "no masks (.seg.png) for 5 of 6 images: a/0, b/1, a/2" in message


def test_a_list_needs_the_column(root):
    settings = file_list(root)
    other = settings.model_copy(update={"masks": settings.masks.model_copy(update={"column": "annotation"})})
    assert "none is called 'annotation'" in error_of(open_source, other)
    (root / "list.csv").write_text("\n".join(f"images/{name}.jpg,masks/{name}.png" for name in NAMES))
    assert "the first line does not name the columns" in error_of(open_source, settings)
    (root / "list.csv").write_text(f"image,mask\nimages/{NAMES[0]}.jpg,\n")
    assert "list.csv:2: the path ''" in error_of(open_source, settings)


def test_a_list_is_read_once_for_both(root):
    """A long list is cached, its images and its masks apart."""
    many = "\n".join(f"images/{NAMES[0]}.jpg,masks/{NAMES[0]}.png" for _ in range(40_000))
    (root / "list.csv").write_text("image,mask\n" + many)
    first, second = (open_source(FileListSettings(path=str(root / "list.csv"), masks=RULES)) for _ in range(2))
    assert len(list((root / "cache/kd_pipeline/index").glob("*.index"))) == 2
    assert len(first.masks) == len(second.masks) == 40_000 and first.masks.name(7) == second.masks.name(7)
    assert np.array_equal(first.masks.read(np.array([7]))[0], np.asarray(Image.open(root / f"masks/{NAMES[0]}.png")))
