"""Pictures decoded by the loader's own graph in one way, on a CPU or GPU, held against what the CPU makes of them."""

import ctypes
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kd_pipeline._core.child_process import open_report, run_child
from kd_pipeline._core.settings import Settings
from kd_pipeline.data.dali import DecodeWay, Graph, GraphSettings, Probe, Samples
from kd_pipeline.data.transforms import TrainTransform, parameters_of

__all__ = ["DecodeTrial", "compare_decoding", "describe_faults", "make_pictures", "try_decoding"]

_CHILD = "kd_pipeline.data.decode_trial:report_trial"
"""What the process of a trial calls."""
_NUM_PICTURES, _NUM_ROUNDS = 64, 6
"""Each round decodes all pictures as one batch, in another order, so that a stale image shows as another picture."""
_SIZE, _TILE = 64, 8
"""Pixels of a finished view, and of the squares in it that are compared."""
_WRONG = 24.0
"""Levels of 255 by which a square's mean may be off. On these pictures another IDCT is at most 2.2 off and a resize
without antialiasing 6.1; a square that was not written is at least 30 off, and another picture 53."""
_BLANK = 2.0
"""Levels by which a picture of one color may still vary."""
_NO_ANSWER = ("out of memory", "bad_alloc", "memoryerror", "cuda is not available", "busy or unavailable")
"""What errors say that are not the decoder's."""
_TRANSFORM = TrainTransform(size=_SIZE, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
_MAX_PIXELS = 10**7
_LOG_LENGTH = 2000


class DecodeTrial(Settings):
    """What came of decoding pictures in one way."""

    decode: DecodeWay
    hw_decoder_load: float
    works: bool
    detail: str
    """How far the pixels are from the CPU's, or what went wrong."""
    has_answered: bool = True
    """False where the trial could not be made, as with too little memory: that says nothing about the decoder."""
    nvjpeg: tuple[int, int] | None = None
    """Version of the nvJPEG library that nvImageCodec has loaded."""
    log: str = ""
    """The end of what the process printed, where it did not come to report."""

    def __str__(self) -> str:
        way = {"window": "windows", "full": "whole images"}[self.decode]
        share = f" with hw_decoder_load {self.hw_decoder_load:g}" if self.hw_decoder_load else ""
        return f"{way}{share}: {self.detail}"


def try_decoding(
    decode: DecodeWay, *, device_id: int | None, hw_decoder_load: float = 0.0, timeout_s: float = 60.0
) -> DecodeTrial:
    """Decode pictures in a process of its own, whose crash or hang is a finding like any other.

    Args:
        decode: the way to try.
        device_id: ordinal of the GPU, or None for the CPU.
        hw_decoder_load: share of JPEG images for a GPU's hardware decoder.
        timeout_s: seconds after which the process counts as hanging.
    """
    device = "cpu" if device_id is None else str(device_id)
    child = run_child(_CHILD, decode, device, str(hw_decoder_load), timeout_s=timeout_s)
    if child.lines and not child.failure:
        try:
            return DecodeTrial.model_validate_json(child.lines[-1])
        except ValueError:
            failure = f"reported {child.lines[-1]!r:.80}"
    else:
        failure = child.failure or "ended without a report"
    log = child.log.strip()[-_LOG_LENGTH:]
    return DecodeTrial(decode=decode, hw_decoder_load=hw_decoder_load, works=False, detail=failure, log=log)


def make_pictures(folder: Path) -> list[Path]:
    """Write pictures of many sizes, chroma subsamplings and formats, no two of them alike."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(_NUM_PICTURES):
        height, width = rng.integers(97, 480, size=2) if number % 16 else (768, 1024)
        picture = Image.fromarray(_picture(rng, int(height), int(width)))
        paths.append(folder / f"{number:02}.{'png' if number % 16 == 5 else 'jpg'}")
        if number % 16 == 5:
            picture.save(paths[-1])
        elif number % 16 == 9:
            picture.convert("L").save(paths[-1], quality=90)
        else:
            picture.save(paths[-1], quality=90, subsampling=number % 3, progressive=number % 8 == 7)
    return paths


def describe_faults(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> str:
    """What is wrong with views `[N, 3, H, W]` on the scale from 0 to 255; empty where nothing is."""
    wrong = np.flatnonzero(~(_worst_tile(found, wanted) <= _WRONG))  # NaN is wrong too
    if not len(wrong):
        return ""
    blank = [row for row in wrong if np.ptp(found[row], axis=(1, 2)).max() < _BLANK]
    others = [row for row in wrong if row not in blank and (_worst_tile(found[row], wanted) <= _WRONG).any()]
    kinds = [(blank, "of one color"), (others, "another image's")]
    named = ", ".join(f"{len(rows)} {kind}" for rows, kind in kinds if rows)
    return f"{len(wrong)} of {len(found)} images are wrong" + (f" ({named})" if named else "")


def report_trial(decode: DecodeWay, device: str, hw_decoder_load: str) -> None:
    """Make the trial in this process and report it to its parent."""
    report = open_report()
    device_id, load = None if device == "cpu" else int(device), float(hw_decoder_load)
    works, has_answered = False, True
    try:
        works, detail = compare_decoding(decode, device_id=device_id, hw_decoder_load=load)
    except Exception as exc:
        detail = " ".join(f"{type(exc).__name__}: {exc}".split())[:400]
        has_answered = not any(word in detail.lower() for word in _NO_ANSWER)
    trial = DecodeTrial(
        decode=decode,
        hw_decoder_load=load,
        works=works,
        detail=detail,
        has_answered=has_answered,
        nvjpeg=_loaded_nvjpeg(),
    )
    print(trial.model_dump_json(), file=report)


def compare_decoding(decode: DecodeWay, *, device_id: int | None, hw_decoder_load: float = 0.0) -> tuple[bool, str]:
    """Whether pictures that are decoded in this process come out right, and how far they are off.

    Raises:
        RuntimeError: DALI cannot decode them, or the CPU itself decodes nothing but one color.
    """
    settings = GraphSettings(
        max_batch=_NUM_PICTURES,
        device_id=device_id,
        num_threads=4,
        prefetch=2,
        max_pixels=_MAX_PIXELS,
        decode=decode,
        hw_decoder_load=hw_decoder_load,
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder))
        wanted = _render(paths, replace(settings, device_id=None, decode="window"))
        found = _render(paths, settings)
    if np.ptp(wanted, axis=(2, 3)).max(axis=1).min() < _BLANK:
        raise RuntimeError("the CPU's decoder gives images of one color")
    if faults := describe_faults(found, wanted):
        return False, faults
    apart = np.abs(found - wanted).mean(axis=(1, 2, 3)).max()
    return True, f"{len(found)} images are right, each at most {apart:.2f}/255 from the CPU's pixels on average"


def _render(paths: list[Path], settings: GraphSettings) -> NDArray[np.float32]:
    """All rounds of views `[N, 3, H, W]`."""
    graph = Graph(_rounds(paths), "files", _TRANSFORM, settings, Probe(settings))
    try:
        views = [graph.take() for _ in range(_NUM_ROUNDS)]  # held all at once, as a slow consumer would
        if settings.device_id is not None:
            views = [view.as_cpu() for view in views]
        return np.concatenate([np.array(view) for view in views])
    finally:
        graph.close()


def _rounds(paths: list[Path]) -> Iterator[Samples]:
    names = np.array([str(path).encode() for path in paths])
    data = names.view(np.uint8).reshape(len(paths), -1)
    rng = np.random.default_rng(1)
    while True:
        index = rng.permutation(len(paths))
        draws = rng.random((len(paths), _TRANSFORM.num_draws))
        tries, place = _TRANSFORM.crop.parameters(draws)
        at_border = np.arange(len(paths)) % 3 == 0
        place = np.where(at_border[:, None], np.where(place < 0.5, 0.0, 1 - 2.0**-24), place)
        yield Samples(index, data[index], (tries, place), parameters_of(_TRANSFORM, draws))


def _picture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Waves, a gradient and some bright rectangles, with a little noise: `[height, width, 3]`."""
    y, x = np.mgrid[0:height, 0:width] / 100
    picture = np.empty((height, width, 3))
    for channel in range(3):
        frequency, phase = rng.uniform(0.5, 6, size=(3, 2)), rng.uniform(0, 6, size=3)
        waves = [np.sin(fy * y + fx * x + p) for (fy, fx), p in zip(frequency, phase, strict=True)]
        picture[..., channel] = 127 + 35 * sum(waves) + 20 * np.sin(y + channel)
    for _ in range(4):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        picture[top : top + rng.integers(20, 90), left : left + rng.integers(20, 90)] += rng.uniform(-60, 60, size=3)
    return np.clip(picture + rng.normal(0, 4, size=picture.shape), 0, 255).astype(np.uint8)


def _worst_tile(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[N]`: of each view's squares, the mean distance of the one that is farthest off."""
    apart = np.abs(found - wanted)
    tiles = apart.reshape(len(apart), 3, _SIZE // _TILE, _TILE, _SIZE // _TILE, _TILE)
    worst: NDArray[np.float32] = tiles.mean(axis=(3, 5)).max(axis=(1, 2, 3))
    return worst


def _loaded_nvjpeg() -> tuple[int, int] | None:
    """Version of the nvJPEG that this process has loaded, as it says itself."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "/libnvjpeg.so" in path:
            library, value = ctypes.CDLL(path), ctypes.c_int()
            numbers = []
            for part in range(2):  # MAJOR_VERSION, MINOR_VERSION
                if library.nvjpegGetProperty(part, ctypes.byref(value)):
                    return None
                numbers.append(value.value)
            return numbers[0], numbers[1]
    return None
