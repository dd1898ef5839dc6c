"""Arrays in memory and in files, which are never unpickled."""

import os

import numpy as np
import pytest

from kd_pipeline.data.sources import Arrays
from tests.data.sources.helpers import error_of, make_files


def test_memory_npy_and_npz_are_equivalent(tmp_path, pixels):
    labels = np.array([0, 1, 2, 0, 1, 2, 0], dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(pixels))
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "both.npz", images=pixels, labels=labels)
    np.savez_compressed(tmp_path / "alone.npz", whatever=pixels)
    np.savez(tmp_path / "more.npz", images=pixels, labels=labels[::-1], other=labels)
    sources = [
        Arrays(pixels, labels),
        Arrays(tmp_path / "images.npy", str(tmp_path / "labels.npy")),
        Arrays(tmp_path / "fortran.npy", labels.astype(np.int16)),
        Arrays(tmp_path / "both.npz"),
        Arrays(tmp_path / "both.npz", tmp_path / "both.npz"),
        Arrays(tmp_path / "alone.npz", labels),
        Arrays(tmp_path / "more.npz", labels),
    ]
    order = np.array([6, 0, 3, 3])
    for source in sources:
        assert len(source) == 7 and source.num_classes == 3 and source.classes is None
        assert source.labels.dtype == np.int64 and source.labels.tolist() == labels.tolist()
        images = source.read(order)
        assert images.flags.c_contiguous and np.array_equal(images, pixels[order])
        images[:] = 0
        assert np.array_equal(source.read(order), pixels[order])
    assert len({source.fingerprint for source in sources}) == 1


def test_gray_images_get_three_channels(pixels):
    gray = pixels[..., 0]
    for images in (gray, gray[..., None]):
        assert np.array_equal(Arrays(images).read(np.array([2, 1])), np.stack([gray[[2, 1]]] * 3, axis=-1))


def test_names_are_file_and_position(tmp_path, pixels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", pixels)
    assert Arrays("images.npy").name(6) == "images.npy[6]" and Arrays(pixels).name(6) == "images[6]"


def test_labels_are_optional(tmp_path, pixels):
    np.savez(tmp_path / "images.npz", images=pixels)
    for source in (Arrays(pixels), Arrays(tmp_path / "images.npz")):
        assert source.labels is None and source.num_classes is None
    assert Arrays(pixels, classes=("a", "b")).num_classes == 2


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("float32", (2, 4, 4, 3)), ("int8", (2, 4, 4, 3)), ("bool", (2, 4, 4)), ("uint16", (2, 4, 4)),
        ("uint8", (2, 3, 4, 4)), ("uint8", (4, 4)), ("uint8", (2, 4, 4, 4)),
        ("uint8", (0, 4, 4, 3)), ("uint8", (2, 0, 4, 3)),
    ],
)  # fmt: skip
def test_wrong_dtype_or_shape_is_refused(tmp_path, dtype, shape):
    message = error_of(Arrays, np.zeros(shape, dtype))
    assert f"found {dtype} {list(shape)}" in message and "expected uint8 images [N, H, W]" in message
    np.save(tmp_path / "images.npy", np.zeros(shape, dtype))
    assert str(tmp_path / "images.npy") in error_of(Arrays, tmp_path / "images.npy")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(6, np.int64), "labels: expected integer labels [7], one for each image, found int64 [6]"),
        (np.zeros((7, 1), np.int64), "found int64 [7, 1]"),
        (np.zeros(7), "found float64 [7]"),
        (np.zeros(7, bool), "found bool [7]"),
        (
            np.array([0, 0, 3, 0, 9, 0, 0]),
            "labels[2]: the label 3 is not a class index from 0 to 2 (2 of 7",
        ),
        (np.array([0, 0, 0, 0, 0, 0, -1]), "labels[6]: the label -1 is not a class index from 0 to 2"),
        (np.full(7, 2**64 - 1, np.uint64), "labels[0]: the label 18446744073709551615 is not"),
    ],
)
def test_wrong_labels_are_refused_by_position(pixels, labels, words):
    assert words in error_of(Arrays, pixels, labels, classes=("a", "b", "c"))


def test_bad_files_are_refused_and_never_unpickled(tmp_path, pixels):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    np.save(tmp_path / "pickled.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", images=np.array([Trap()], dtype=object))
    make_files(tmp_path, "text.npy", "text.npz")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "intact.npy", pixels)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "intact.npy").read_bytes()[:-10])
    np.savez(tmp_path / "intact.npz", images=pixels)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "intact.npz").read_bytes()[:-10])
    names = ["pickled.npy", "pickled.npz", "text.npy", "text.npz", "empty.npy", "cut.npy", "cut.npz", "none.npy"]
    for name in names:
        for message in (error_of(Arrays, tmp_path / name), error_of(Arrays, pixels, tmp_path / name)):
            assert message.startswith(f"{tmp_path / name}: cannot be read as an .npy or .npz file"), message
            assert "unsafe" not in message
    assert not (tmp_path / "owned").exists()


def test_npz_without_wanted_array_is_refused(tmp_path, pixels):
    np.savez(tmp_path / "mnist.npz", x_train=pixels, y_train=np.zeros(7, int))
    assert "no array named 'images' among ['x_train', 'y_train']" in error_of(Arrays, tmp_path / "mnist.npz")
    assert "no array named 'labels' among ['x_train', 'y_train']" in error_of(Arrays, pixels, tmp_path / "mnist.npz")


@pytest.mark.parametrize(
    ("images", "advice"),
    [
        (lambda pixels: pixels.transpose(0, 3, 1, 2), "save images.transpose(0, 2, 3, 1), because channels come last"),
        (
            lambda pixels: pixels / np.float32(255),
            "save (255 * images).round().astype(np.uint8) for pixels",
        ),
        (lambda pixels: pixels.astype(np.float64), "images.astype(np.uint8) for 0 to 255"),
        (lambda pixels: pixels.astype(np.uint16) * 257, "save (images // 257).astype(np.uint8) for pixels of 16 bits"),
        (lambda pixels: pixels.astype(np.int64), "save images.astype(np.uint8) for pixels from 0 to 255"),
        (lambda pixels: np.concatenate([pixels, pixels[..., :1]], -1), "save images[..., :3] for images without"),
        (lambda pixels: np.zeros((2, 3072), np.uint8), "save images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)"),
    ],
)
def test_advice_about_images_works(pixels, images, advice):
    images = images(pixels)
    message = error_of(Arrays, images)
    assert advice in message
    for step in message.rpartition("; save ")[2].split(", then "):
        code = step.partition(" for ")[0].partition(", because")[0]
        images = eval(code, {"images": images, "np": np})
    assert Arrays(images).read(np.array([0])).dtype == np.uint8


@pytest.mark.parametrize(
    ("labels", "advice"),
    [
        (lambda labels: labels[:, None], "; save labels[:, 0]"),
        (lambda labels: np.eye(3)[labels], "; save labels.argmax(axis=1)"),
        (lambda labels: labels.astype(np.float32), "; save labels.astype(np.int64)"),
        (lambda labels: labels > 0, "; save labels.astype(np.int64)"),
        (lambda labels: np.array(["c", "a", "b"])[labels], "; save np.unique(labels, return_inverse=True)[1]"),
    ],
)
def test_advice_about_labels_works(pixels, labels, advice):
    labels = labels(np.array([0, 1, 2, 0, 1, 2, 0]))
    message = error_of(Arrays, pixels, labels)
    assert advice in message
    code = message.rpartition("; save ")[2].partition(", and ")[0].partition(" if ")[0]
    assert len(Arrays(pixels, eval(code, {"labels": labels, "np": np})).labels) == 7


def test_labels_from_1_are_suspicious(pixels, caplog):
    (warning,) = Arrays(pixels, np.array([1, 2, 3, 1, 2, 3, 1])).warnings
    assert "labels from 1 to 3, and classes count from 0" in warning and warning in caplog.text


def test_other_files_say_what_they_are(tmp_path, pixels):
    make_files(tmp_path, "images.h5", "folder/")
    assert "it is a database: write its images to files" in error_of(Arrays, tmp_path / "images.h5")
    (tmp_path / "images.npy").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n")
    assert "a pointer of git-lfs: fetch the file itself: git lfs pull" in error_of(Arrays, tmp_path / "images.npy")
    assert "is a folder, and images is an .npy or .npz file" in error_of(Arrays, tmp_path / "folder")
    assert "s3://bucket/images.npy is a URL" in error_of(Arrays, "s3://bucket/images.npy")
