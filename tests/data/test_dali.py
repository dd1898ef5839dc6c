"""DALI graphs: decoded pixels, order of batches, and refused files."""

import itertools
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image, ImageOps

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.data.auto_augment import RandAugment, TrivialAugment
from kd_pipeline.data.dali import FileChecker, Graph
from kd_pipeline.data.plan import uniforms
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import Views
from kd_pipeline.errors import ConfigError
from tests.corpus import ODD, encoded
from tests.views import PIXELS, graph_settings, open_graph, render, samples_of

EVAL = EvalTransform(size=32, resize=36, **PIXELS)
TRAIN = TrainTransform(size=32, **PIXELS)
ALL_TRANSFORMS = {
    "eval": EVAL,
    "eval bicubic float16": EvalTransform(size=32, interpolation="bicubic", dtype="float16"),
    "train": TRAIN,
    "every op": TrainTransform(
        size=32, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5, erase=0.5
    ),
    "every op float16": TrainTransform(size=32, hue=0.1, grayscale=0.2, blur=0.5, erase=0.5, dtype="float16"),
    "randaugment": TrainTransform(size=32, auto_augment=RandAugment()),
    "trivialaugment": TrainTransform(size=32, auto_augment=TrivialAugment(), erase=0.5),
}
ORIENTATION = 0x0112
"""EXIF tag of the camera's orientation."""


@pytest.fixture(scope="module")
def photo(photos):
    """A piece of the flower, `[90, 121, 3]`."""
    return photos[1][150:240, 250:371]


def save(image, path, **options):
    """Save an image; returns the file, and its upright RGB pixels in Pillow."""
    image.save(path, **options)
    with Image.open(path) as saved:
        return path, np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))


def lossless(image, path):
    Image.fromarray(image).save(path)
    return path


# File formats


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo, tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path, upright = save(Image.fromarray(photo), tmp_path / f"turned.{kind}", exif=exif)
    assert upright.shape == ((90, 121, 3) if orientation < 5 else (121, 90, 3))
    plain = lossless(upright, tmp_path / "upright.png")
    for transform in (EVAL, TRAIN):
        draws = uniforms(np.arange(8), seed=1, epoch=0, count=transform.num_draws)
        views = render(transform, [path] * 8, draws)
        np.testing.assert_allclose(views, render(transform, [plain] * 8, draws), atol=1)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "cmyk.jpg", "one_bit.tif", "lossless.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_orientation_is_kept(photo, tmp_path, orientation, kind):
    """Also in files that Pillow decodes; it turns TIFF files itself."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    mode = {"cmyk.jpg": "CMYK", "one_bit.tif": "1"}.get(kind, "RGB")
    image = Image.fromarray(photo[:, :120]).convert(mode)
    path = tmp_path / f"turned.{kind}"
    image.save(path, exif=exif, quality=95, lossless=kind == "lossless.webp")
    with Image.open(path) as saved:
        upright = ImageOps.exif_transpose(saved).convert("RGB")
    backward = {5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose({2: 0, 3: 3, 4: 1, **backward}[orientation])
    assert stored.size == (120, 90) and (upright.size == (120, 90)) == (orientation < 5)
    for number, shown in enumerate((upright, stored)):
        plain = lossless(np.asarray(shown), tmp_path / f"{number}.png")
        for kept in (EVAL, TRAIN):
            transform = kept.model_copy(update={"orientation": ("upright", "stored")[number]})
            for mode in ("window", "full"):
                draws = uniforms(np.arange(4), seed=1, epoch=0, count=transform.num_draws)
                views = render(transform, [path] * 4, draws, decode=mode)
                np.testing.assert_allclose(views, render(transform, [plain] * 4, draws), atol=1)


def exif(orientation, layout="<HHIHH", kind=3):
    """An EXIF block with nothing but an orientation."""
    mark = b"II*\0" if layout[0] == "<" else b"MM\0*"
    numbers = (0x0112, kind, 1, orientation, 0) if layout.endswith("HH") else (0x0112, kind, 1, orientation)
    return mark + struct.pack(f"{layout[0]}IH", 8, 1) + struct.pack(layout, *numbers) + bytes(4)


def with_segments(jpeg, *blocks):
    """A JPEG with blocks of EXIF."""
    segments = [b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block for block in blocks]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def with_chunks(png, before=(), after=()):
    """A PNG with chunks before and after its pixels."""
    before, after = (
        b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in part
        )
        for part in (before, after)
    )
    return png[:33] + before + png[33:-12] + after + png[-12:]


PROFILE = b"\nexif\n      32\n" + (b"Exif\0\0" + exif(6)).hex().encode() + b"\n"
UNUSUAL_EXIF = {
    "one.jpg": lambda jpeg, png: with_segments(jpeg, exif(6)),
    "two equal.jpg": lambda jpeg, png: with_segments(jpeg, exif(6), exif(6)),
    "two that disagree.jpg": lambda jpeg, png: with_segments(jpeg, exif(1), exif(6)),
    "two that disagree otherwise.jpg": lambda jpeg, png: with_segments(jpeg, exif(6), exif(3)),
    "long.jpg": lambda jpeg, png: with_segments(jpeg, exif(6, ">HHII", 4)),
    "byte.jpg": lambda jpeg, png: with_segments(jpeg, exif(6, kind=1)),
    "impossible.jpg": lambda jpeg, png: with_segments(jpeg, exif(9)),
    "cut off.jpg": lambda jpeg, png: with_segments(jpeg, exif(6)[:15]),
    "after.png": lambda jpeg, png: with_chunks(png, after=[(b"eXIf", exif(6))]),
    "two that disagree.png": lambda jpeg, png: with_chunks(png, [(b"eXIf", exif(3))], [(b"eXIf", exif(6))]),
    "prefix.png": lambda jpeg, png: with_chunks(png, [(b"eXIf", b"Exif\0\0" + exif(6))]),
    "prefix after.png": lambda jpeg, png: with_chunks(png, after=[(b"eXIf", b"Exif\0\0" + exif(6))]),
    "profile.png": lambda jpeg, png: with_chunks(
        png, [(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE))]
    ),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", UNUSUAL_EXIF)
def test_unusual_exif_is_read_as_in_pillow(photo, tmp_path, name):
    jpeg, png = encoded(photo, "JPEG", quality=95), encoded(photo, "PNG")
    path = tmp_path / name
    path.write_bytes(UNUSUAL_EXIF[name](jpeg, png))
    with Image.open(path) as image:
        plain = lossless(np.asarray(ImageOps.exif_transpose(image).convert("RGB")), tmp_path / "plain.png")
    for transform in (EVAL, TRAIN):
        for mode in ("window", "full"):
            np.testing.assert_allclose(render(transform, [path], decode=mode), render(transform, [plain]), atol=1)


FORMATS = {
    "gray.jpg": lambda image: image.convert("L"),
    "gray.png": lambda image: image.convert("L"),
    "gray_and_alpha.png": lambda image: image.convert("LA"),
    "black_and_white.png": lambda image: image.convert("1"),
    "cmyk.jpg": lambda image: image.convert("CMYK"),
    "palette.png": lambda image: image.quantize(64),
    "palette.bmp": lambda image: image.quantize(64),
    "transparent.png": lambda image: Image.merge("RGBA", [*image.split(), image.getchannel(1)]),
    "transparent.webp": lambda image: Image.merge("RGBA", [*image.split(), image.getchannel(1)]),
    "photo.webp": lambda image: image,
    "photo.bmp": lambda image: image,
    "photo.tif": lambda image: image,
    "gray.tif": lambda image: image.convert("L"),
    "photo.ppm": lambda image: image,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_decode_as_in_pillow(photo, tmp_path, name):
    """Up to rounding of a filter; transparency is ignored, as in Pillow's `convert`."""
    path, expected = save(FORMATS[name](Image.fromarray(photo)), tmp_path / name)
    plain = lossless(expected, tmp_path / "plain.png")
    for transform in (EVAL, TRAIN):
        np.testing.assert_allclose(render(transform, [path]), render(transform, [plain]), atol=1)


def test_progressive_jpeg_decodes_as_in_pillow(photo, tmp_path):
    path, expected = save(Image.fromarray(photo), tmp_path / "progressive.jpg", progressive=True)
    plain = lossless(expected, tmp_path / "plain.png")
    for transform in (EVAL, TRAIN):
        np.testing.assert_allclose(render(transform, [path]), render(transform, [plain]), atol=1)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bit_gray_is_scaled(tmp_path, kind):
    """Pillow's `convert` clips at 255."""
    deep = np.linspace(0, 65535, 90 * 121).round().astype(np.uint16).reshape(90, 121)
    Image.fromarray(deep).save(tmp_path / f"deep.{kind}")
    shallow = np.repeat(np.round(deep / 257).astype(np.uint8)[..., None], 3, axis=-1)
    plain = lossless(shallow, tmp_path / "plain.png")
    np.testing.assert_allclose(render(EVAL, [tmp_path / f"deep.{kind}"]), render(EVAL, [plain]), atol=1)


def test_files_and_pixels_give_equal_views(photos, tmp_path):
    images = np.stack([photo[y : y + 71, x : x + 90] for photo in photos for y, x in [(0, 0), (200, 30), (300, 500)]])
    paths = [lossless(image, tmp_path / f"{number}.png") for number, image in enumerate(images)]
    everything = TrainTransform(size=32, brightness=0.4, hue=0.1, grayscale=0.2, blur=0.5, erase=0.5)
    for transform in (EVAL, TRAIN, everything):
        np.testing.assert_array_equal(render(transform, paths), render(transform, images))


def test_batch_of_different_image_sizes(photo_folder):
    paths = sorted(path for path in photo_folder.rglob("*.*"))
    together = render(TRAIN, paths)
    assert together.shape == (37, 3, 32, 32)
    draws = uniforms(np.arange(37), seed=0, epoch=0, count=TRAIN.num_draws)
    for row in (0, 17, 36):
        np.testing.assert_array_equal(render(TRAIN, [paths[row]], draws[row : row + 1])[0], together[row])


# Decode modes


@pytest.fixture(scope="module")
def corpus(photo, tmp_path_factory):
    """Readable files of all formats, orientations and subsamplings, and the odd ones."""
    folder = tmp_path_factory.mktemp("corpus")
    image = Image.fromarray(photo)
    paths = [save(convert(image), folder / name)[0] for name, convert in FORMATS.items()]
    for orientation, kind in itertools.product(range(2, 9), ("jpg", "png", "tif", "webp")):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        paths.append(save(image, folder / f"turned {orientation}.{kind}", exif=exif)[0])
    for subsampling, progressive in itertools.product(range(3), (False, True)):
        path = folder / f"subsampled {subsampling} {progressive}.jpg"
        paths.append(save(image, path, subsampling=subsampling, progressive=progressive)[0])
    for odd in ODD:
        paths.append(folder / odd.name)
        paths[-1].write_bytes(odd.encode(photo))
    return paths


@pytest.mark.parametrize("transform", ALL_TRANSFORMS.values(), ids=ALL_TRANSFORMS)
def test_decode_modes_give_equal_pixels(corpus, transform):
    for seed in range(3):
        draws = uniforms(np.arange(len(corpus)), seed=seed, epoch=0, count=transform.num_draws)
        windows, whole = (render(transform, corpus, draws, decode=mode) for mode in ("window", "full"))
        np.testing.assert_array_equal(windows, whole)
    assert len(windows) == len(corpus) > 60


def test_decode_mode_does_not_affect_pixels(photos):
    images = np.stack([photo[:71, :90] for photo in photos])
    np.testing.assert_array_equal(*(render(TRAIN, images, decode=mode) for mode in ("window", "full")))


# Windows in DALI


@pytest.mark.parametrize("extent", [1.0, 9.999, 10.0, 10.2, 10.5, 10.8, 39.6])
def test_dali_truncates_extent_and_rounds_position(tmp_path, extent):
    """In the decoder and in the crop of pixels, which is why windows are rounded before."""
    image = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(20, axis=1)
    encoded = np.fromfile(lossless(image, tmp_path / "rows.png"), dtype=np.uint8)
    places = np.float32([0, 0.1, 0.25, 0.37, 0.5, 0.51, 0.9, 1])
    sources = ([encoded] * len(places), [image] * len(places), places)
    pipeline = Pipeline(batch_size=len(places), num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        file, pixels, place = fn.external_source(
            lambda: sources, num_outputs=3, dtype=[types.UINT8, types.UINT8, types.FLOAT], layout=["", "HWC", ""]
        )
        window = {"crop_h": extent, "crop_w": 20.0, "crop_pos_y": place, "crop_pos_x": 0.0}
        pipeline.set_outputs(fn.decoders.image_crop(file, **window), fn.crop(pixels, **window))
    for output in pipeline.run():
        for place, rows in zip(places, (np.array(sample)[:, 0, 0] for sample in output), strict=True):
            first = int(np.floor(place * (40 - int(extent)) + 0.5))
            assert rows.tolist() == list(range(first, first + int(extent)))


# Refused files


def test_max_pixels_is_inclusive(photo, tmp_path):
    path = lossless(photo[:60, :50], tmp_path / "3000.png")
    for transform in (EVAL, TRAIN):
        assert render(transform, [path], max_pixels=3000).shape == (1, 3, 32, 32)
        with pytest.raises(RuntimeError):
            render(transform, [path], max_pixels=2999)


def test_jpeg_without_end_is_refused_for_any_view(photo, tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(photo).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:-2])
    draws = np.zeros((1, TRAIN.num_draws), dtype=np.float32)
    assert render(TRAIN, [whole], draws).shape == (1, 3, 32, 32)
    with pytest.raises(RuntimeError):
        render(TRAIN, [cut], draws)


def test_bytes_after_jpeg_end_are_ignored(photo, tmp_path):
    path = tmp_path / "junk.jpg"
    Image.fromarray(photo).save(path)
    expected = render(EVAL, [path])
    path.write_bytes(path.read_bytes() + b"junk")
    np.testing.assert_array_equal(render(EVAL, [path]), expected)


@pytest.mark.parametrize("name", ["whole.jpg", "junk.jpg", "photo.tif", "photo.png"])
def test_doubtful_file_is_fully_decoded_once(photo, tmp_path, monkeypatch, name):
    path = tmp_path / name
    Image.fromarray(photo).save(path)
    if name == "junk.jpg":
        path.write_bytes(path.read_bytes() + b"junk")
    decoded = []
    decode = FileChecker.decode
    monkeypatch.setattr(FileChecker, "decode", lambda checker, file: (decoded.append(file), decode(checker, file)))
    settings = graph_settings(1)
    checker = FileChecker(settings)
    for _ in range(2):
        graph = Graph(itertools.repeat(samples_of(EVAL, [path])), "files", Views.of(EVAL), settings, checker)
        for _ in range(3):
            graph.take()
        graph.close()
    assert len(decoded) == (name in ("junk.jpg", "photo.tif"))


MEASURED = """
import sys
from pathlib import Path

from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from tests.views import render

def most_memory_mb():
    # Not getrusage, whose ru_maxrss a child process inherits from its parent.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

small, *others = map(Path, sys.argv[1:])
transforms = EvalTransform(size=32), TrainTransform(size=32)
for transform in transforms:
    render(transform, [small])
before = most_memory_mb()
for other in others:
    for transform in transforms:
        try:
            render(transform, [other])
        except RuntimeError:
            print("refused", end=" ")
print(most_memory_mb() - before)
"""


def run_measured(small, *others):
    """Read the others in a process; returns its words, and the growth of its peak memory in MB."""
    command = [sys.executable, "-c", MEASURED, str(small), *map(str, others)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *words, growth = done.stdout.split()
    return words, int(growth)


@pytest.mark.slow
def test_bomb_is_refused_by_header(photo, tmp_path):
    """A PNG of 110 kB with 900 million pixels (2.7 GB), and a JPEG that claims 4 billion (13 GB)."""
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    small = lossless(photo, tmp_path / "small.png")
    Image.fromarray(photo).save(tmp_path / "header.jpg")
    jpeg = (tmp_path / "header.jpg").read_bytes()
    frame = jpeg.index(b"\xff\xc0")
    height_and_width = (65_500).to_bytes(2, "big") * 2
    (tmp_path / "header.jpg").write_bytes(jpeg[: frame + 5] + height_and_width + jpeg[frame + 9 :])
    words, growth_mb = run_measured(small, tmp_path / "bomb.png", tmp_path / "header.jpg")
    assert words == ["refused"] * 4 and growth_mb < 300


def test_long_line_decodes_only_center(photo, tmp_path):
    """Resized in full, 1x100000 pixels would become 37x3700000 (411 MB)."""
    small = lossless(photo, tmp_path / "small.png")
    line = lossless(np.full((1, 100_000, 3), 7, dtype=np.uint8), tmp_path / "line.png")
    column = lossless(np.full((100_000, 1, 3), 7, dtype=np.uint8), tmp_path / "column.png")
    words, growth_mb = run_measured(small, line, column)
    assert words == [] and growth_mb < 300


# Batches


def batches(num_batches, num_images, transform=EVAL, folder=None):
    """Images whose pixels are the number of their batch, as pixels or as files in a folder."""
    for number in range(num_batches):
        images = np.full((num_images - number % 2, 40, 40, 3), number, dtype=np.uint8)
        files = [lossless(image, folder / f"{number}_{row}.png") for row, image in enumerate(images)] if folder else []
        yield samples_of(transform, files or images)


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("transform", [EVAL, TRAIN])
@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_batches_come_in_order(tmp_path, prefetch, transform, stores):
    samples = batches(7, 5, transform, tmp_path if stores == "files" else None)
    graph = open_graph(samples, stores, transform, graph_settings(5, prefetch=prefetch))
    for number in range(7):
        images = np.array(graph.take()[IMAGES])
        assert images.shape == (5 - number % 2, 3, 32, 32) and (images == number).all()
    for _ in range(2):
        with pytest.raises(StopIteration):
            graph.take()
    graph.close()


@pytest.mark.parametrize("stores", ["files", "pixels"])
def test_graph_may_be_closed_twice(tmp_path, stores):
    graph = open_graph(batches(3, 2, folder=tmp_path if stores == "files" else None), stores, EVAL, graph_settings(2))
    graph.take()
    graph.close()
    graph.close()


SPOIL = {
    "no file": Path.unlink,
    "no header": lambda path: path.write_bytes(b"junk"),
    "too few pixels": lambda path: path.write_bytes(path.read_bytes()[:-9]),
}


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("number", [0, 1, 5, 6])
@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_bad_file_fails_only_its_batch(tmp_path, prefetch, number, spoil):
    """If the file, its header or its pixels cannot be read."""
    samples = list(batches(7, 5, folder=tmp_path))
    spoil(tmp_path / f"{number}_3.png")
    graph = open_graph(iter(samples), "files", EVAL, graph_settings(5, prefetch=prefetch))
    for good in range(number):
        assert (np.array(graph.take()[IMAGES]) == good).all()
    with pytest.raises(RuntimeError):
        graph.take()
    graph.close()


def test_held_batches_survive_close():
    """Held as torch tensors, which share DALI's memory."""
    graph = open_graph(batches(20, 4), "pixels", EVAL, graph_settings(4, prefetch=2))
    held = [torch.from_dlpack(graph.take()[IMAGES]) for _ in range(20)]
    graph.close()
    assert len({images.data_ptr() for images in held}) == 20
    for number, images in enumerate(held):
        assert (images == number).all()


def test_disabled_dynamic_executor_is_refused(monkeypatch):
    monkeypatch.setattr(Pipeline, "exec_dynamic", False)
    with pytest.raises(ConfigError, match="dynamic executor"):
        open_graph(batches(1, 1), "pixels", EVAL, graph_settings(1))
