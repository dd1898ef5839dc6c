"""Test images decoded by the loader's graph in one mode, on a CPU or GPU, and compared with the CPU's pixels."""

import ctypes
import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kd_pipeline._core.child_process import open_report, run_child
from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.dali import FileChecker, Graph
from kd_pipeline.data.graph_settings import DecodeMode, GraphInput, GraphSettings
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.data.views import Views

__all__ = [
    "DecodeTrial",
    "Nvjpeg",
    "compare_decoding",
    "describe_faults",
    "loaded_nvjpeg",
    "make_images",
    "try_decoding",
]

_CHILD = "kd_pipeline.data.decode_trial:report_trial"
"""Function that the child process of a trial runs."""
_NUM_IMAGES, _NUM_ROUNDS = 64, 3
"""Each round decodes all images twice: as one batch, and in a different order as two. So a stale buffer shows the wrong
image, and an image that depends on its neighbors differs."""
_SPLIT = 41
"""Where the second order of a round is cut into two batches."""
_SIZE, _TILE = 64, 8
"""Side of a transformed view in pixels, and of the squares in it that are compared."""
_WRONG = 24.0
"""Largest error of a square's mean, in levels of 255. On these images a different IDCT is off by at most 2.2, and a
resize without antialiasing by 6.1; a square that was not written is off by at least 30, and a wrong image by 53."""
_BLANK = 2.0
"""Largest range of levels in an image of one color."""
_NOT_THE_DECODER = ("out of memory", "bad_alloc", "memoryerror", "cuda is not available", "busy or unavailable")
"""Texts in errors that say nothing about the decoder."""
_TRANSFORM = TrainTransform(size=_SIZE, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
_VIEWS = Views.of(_TRANSFORM)
_NVJPEG = ("libnvjpeg.so.13", "libnvjpeg.so.12")
"""Names by which nvImageCodec loads it. If another copy has been loaded with such a name, it gets that one."""
_MAX_PIXELS = 10**7
_LOG_LENGTH = 2000


class Nvjpeg(NamedTuple):
    """A loaded nvJPEG library."""

    version: tuple[int, int]
    path: Path


class DecodeTrial(Settings):
    """The result of decoding images in one mode."""

    decode: DecodeMode
    hw_decoder_load: float
    works: bool
    detail: str
    """Distance of the pixels from the CPU's, or what went wrong."""
    is_repeatable: bool = True
    """Whether an image had the same pixels in different batches."""
    is_conclusive: bool = True
    """False if the trial could not run, as with too little memory, which says nothing about the decoder."""
    nvjpeg: tuple[int, int] | None = None
    """Version of the nvJPEG library that nvImageCodec loaded."""
    log: str = ""
    """The end of the process's output, if it did not report."""

    def __str__(self) -> str:
        mode = {"window": "windows", "full": "whole images"}[self.decode]
        share = f" with hw_decoder_load {self.hw_decoder_load:g}" if self.hw_decoder_load else ""
        return f"{mode}{share}: {self.detail}"


def try_decoding(
    decode: DecodeMode,
    *,
    device_id: int | None,
    hw_decoder_load: float = 0.0,
    timeout_s: float = 60.0,
) -> DecodeTrial:
    """Decode test images in a child process; that it crashes or hangs is a result, not an error.

    The child uses the nvJPEG library that this process has loaded, if it has, and otherwise that of DALI's packages.

    Args:
        decode: the mode to test.
        device_id: ordinal of the GPU, or None for the CPU.
        hw_decoder_load: share of JPEG images for the GPU's hardware decoder.
        timeout_s: seconds after which the process counts as hanging.
    """
    device = "cpu" if device_id is None else str(device_id)
    library = loaded_nvjpeg()
    nvjpeg = "" if library is None else str(library.path)
    child = run_child(_CHILD, decode, device, str(hw_decoder_load), nvjpeg, timeout_s=timeout_s)
    if child.lines and not child.failure:
        try:
            return DecodeTrial.model_validate_json(child.lines[-1])
        except ValueError:
            failure = f"reported {child.lines[-1]!r:.80}"
    else:
        failure = child.failure or "ended without a report"
    log = child.log.strip()[-_LOG_LENGTH:]
    return DecodeTrial(decode=decode, hw_decoder_load=hw_decoder_load, works=False, detail=failure, log=log)


def make_images(folder: Path) -> list[Path]:
    """Write different images of many sizes, chroma subsamplings and formats."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(_NUM_IMAGES):
        height, width = rng.integers(97, 480, size=2) if number % 16 else (768, 1024)
        image = Image.fromarray(_random_image(rng, int(height), int(width)))
        paths.append(folder / f"{number:02}.{'png' if number % 16 == 5 else 'jpg'}")
        if number % 16 == 5:
            image.save(paths[-1])
        elif number % 16 == 9:
            image.convert("L").save(paths[-1], quality=90)
        else:
            image.save(paths[-1], quality=90, subsampling=number % 3, progressive=number % 8 == 7)
    return paths


def describe_faults(found: NDArray[np.float32], expected: NDArray[np.float32]) -> str:
    """What is wrong with views `[N, 3, H, W]` on the scale from 0 to 255; empty if nothing is."""
    wrong = np.flatnonzero(~(_worst_tile(found, expected) <= _WRONG))  # NaN is wrong too
    if not len(wrong):
        return ""
    blank = [row for row in wrong if np.ptp(found[row], axis=(1, 2)).max() < _BLANK]
    others = [row for row in wrong if row not in blank and (_worst_tile(found[row], expected) <= _WRONG).any()]
    kinds = [(blank, "of one color"), (others, "another image's")]
    named = ", ".join(f"{len(rows)} {kind}" for rows, kind in kinds if rows)
    return f"{len(wrong)} of {len(found)} images are wrong" + (f" ({named})" if named else "")


def report_trial(decode: DecodeMode, device: str, hw_decoder_load: str, nvjpeg: str) -> None:
    """Run the trial in this process and report it to the parent."""
    report = open_report()
    if nvjpeg:
        ctypes.CDLL(nvjpeg, mode=ctypes.RTLD_GLOBAL)
    device_id, load = None if device == "cpu" else int(device), float(hw_decoder_load)
    works, is_repeatable, is_conclusive = False, True, True
    try:
        works, is_repeatable, detail = compare_decoding(decode, device_id=device_id, hw_decoder_load=load)
    except Exception as exc:
        detail = " ".join(f"{type(exc).__name__}: {exc}".split())[:400]
        is_conclusive = not any(text in detail.lower() for text in _NOT_THE_DECODER)
    library = loaded_nvjpeg()
    trial = DecodeTrial(
        decode=decode,
        hw_decoder_load=load,
        works=works,
        detail=detail,
        is_repeatable=is_repeatable,
        is_conclusive=is_conclusive,
        nvjpeg=None if library is None else library.version,
    )
    print(trial.model_dump_json(), file=report)


def compare_decoding(
    decode: DecodeMode, *, device_id: int | None, hw_decoder_load: float = 0.0
) -> tuple[bool, bool, str]:
    """Whether test images that are decoded in this process are right and the same in any batch; how far they are off.

    Raises:
        RuntimeError: DALI cannot decode them, or even the CPU decodes an image as one color.
    """
    settings = GraphSettings(
        max_batch=_NUM_IMAGES,
        device_id=device_id,
        num_threads=4,
        prefetch=2,
        max_pixels=_MAX_PIXELS,
        decode=decode,
        hw_decoder_load=hw_decoder_load,
        orientation="upright",
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder))
        inputs = _inputs(paths)
        expected = _render(inputs, replace(settings, device_id=None, decode="window"))
        found = _render(inputs, settings)
    if np.ptp(expected, axis=(2, 3)).max(axis=1).min() < _BLANK:
        raise RuntimeError("the CPU's decoder gives images of one color")
    if faults := describe_faults(found, expected):
        return False, True, faults
    index = np.concatenate([batch.index for batch in inputs]).reshape(_NUM_ROUNDS, 2, _NUM_IMAGES)
    views = np.take_along_axis(
        found.reshape(_NUM_ROUNDS, 2, _NUM_IMAGES, *found.shape[1:]), np.argsort(index)[..., None, None, None], axis=2
    )
    error = np.abs(found - expected).mean(axis=(1, 2, 3)).max()
    detail = f"{len(found)} images are right, each at most {error:.2f}/255 from the CPU's pixels on average"
    return True, np.array_equal(views[:, 0], views[:, 1]), detail


def loaded_nvjpeg() -> Nvjpeg | None:
    """The nvJPEG library that this process has loaded, and that nvImageCodec uses; None without one.

    torchvision brings its own copy, with the same name. What was loaded first is what everybody gets.
    """
    for name in _NVJPEG:
        with suppress(OSError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            found = [ctypes.c_int(), ctypes.c_int()]
            for number, value in enumerate(found):  # MAJOR_VERSION, MINOR_VERSION
                if library.nvjpegGetProperty(number, ctypes.byref(value)):
                    return None
            # The file of a loaded library: dladdr(3) takes an address in it.
            info = (ctypes.c_char_p * 4)()
            ctypes.CDLL(None).dladdr(ctypes.cast(library.nvjpegGetProperty, ctypes.c_void_p), ctypes.byref(info))
            return Nvjpeg((found[0].value, found[1].value), Path(os.fsdecode(info[0] or b"")))
    return None


def _render(inputs: list[GraphInput], settings: GraphSettings) -> NDArray[np.float32]:
    """All views `[N, 3, H, W]`, in the order of the inputs."""
    graph = Graph(cycle(inputs), "files", _VIEWS, settings, FileChecker(settings))
    try:
        views = [graph.take()[IMAGES] for _ in inputs]  # all held, as by a slow consumer
        if settings.device_id is not None:
            views = [view.as_cpu() for view in views]
        return np.concatenate([np.array(view) for view in views])
    finally:
        graph.close()


def _inputs(paths: list[Path]) -> list[GraphInput]:
    """The batches of all rounds; within a round, a sample has the same parameters."""
    names = np.array([str(path).encode() for path in paths])
    data = names.view(np.uint8).reshape(len(paths), -1)
    rng, inputs = np.random.default_rng(1), []
    for _ in range(_NUM_ROUNDS):
        draws = rng.random((len(paths), _TRANSFORM.num_draws))
        tries, place = _TRANSFORM.crop.parameters(draws)
        at_border = np.arange(len(paths)) % 3 == 0
        place = np.where(at_border[:, None], np.where(place < 0.5, 0.0, 1 - 2.0**-24), place)
        parameters = tuple(_VIEWS.images.parameters(draws))
        for cuts in ((0, len(paths)), (0, _SPLIT, len(paths))):
            order = rng.permutation(len(paths))
            for index in (order[start:end] for start, end in pairwise(cuts)):
                crop = (tries[index], place[index])
                inputs.append(GraphInput(index, data[index], (crop,), tuple(part[index] for part in parameters)))
    return inputs


def _random_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Waves, a gradient and bright rectangles with a little noise, `[height, width, 3]`."""
    y, x = np.mgrid[0:height, 0:width] / 100
    image = np.empty((height, width, 3))
    for channel in range(3):
        frequency, phase = rng.uniform(0.5, 6, size=(3, 2)), rng.uniform(0, 6, size=3)
        waves = [np.sin(fy * y + fx * x + p) for (fy, fx), p in zip(frequency, phase, strict=True)]
        image[..., channel] = 127 + 35 * sum(waves) + 20 * np.sin(y + channel)
    for _ in range(4):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        image[top : top + rng.integers(20, 90), left : left + rng.integers(20, 90)] += rng.uniform(-60, 60, size=3)
    return np.clip(image + rng.normal(0, 4, size=image.shape), 0, 255).astype(np.uint8)


def _worst_tile(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[N]`, the mean error of the worst square of each view."""
    error = np.abs(found - expected)
    tiles = error.reshape(len(error), 3, _SIZE // _TILE, _TILE, _SIZE // _TILE, _TILE)
    worst: NDArray[np.float32] = tiles.mean(axis=(3, 5)).max(axis=(1, 2, 3))
    return worst
