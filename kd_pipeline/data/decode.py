"""How a loader decodes files: as its settings say, or on a GPU in the way that a trial finds to work there."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kd_pipeline._core.atomic_write import locked, write_atomic
from kd_pipeline._core.files import UntrustedFileError, read_trusted
from kd_pipeline._core.nvidia_driver import query_driver
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline.data.decode_trial import DecodeTrial, Nvjpeg, loaded_nvjpeg, try_decoding
from kd_pipeline.data.graph_settings import DecodeMode
from kd_pipeline.errors import ConfigError

__all__ = [
    "Decode",
    "DecodeChoice",
    "Decoding",
    "choose_decode",
    "keep_choice",
    "pick_decode",
    "resolve_decode",
]

Decode = Literal["auto", "window", "full"]
"""The setting; `auto` is `window` on a CPU, and the result of `choose_decode` on a GPU."""

_logger = logging.getLogger("kd_pipeline")

_VERSION = 3
"""Version of the trial; older choices are not used."""
_MAX_BYTES = 2**16
_MODES: tuple[DecodeMode, ...] = ("full", "window")
"""On a GPU, the preferred one first."""
_WINDOWS_ON_GPU_SINCE = (13, 2)
"""The first nvJPEG with which nvImageCodec decodes windows with fancy upsampling on a GPU and not on the CPU."""
_PACKAGES = {
    "nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "nvjpeg": ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"),
}


class Decoding(NamedTuple):
    """How files are decoded."""

    decode: DecodeMode
    hw_decoder_load: float
    """Share of the JPEG images for a GPU's hardware decoder."""


class DecodeChoice(Settings):
    """What `auto` uses on a GPU."""

    decode: DecodeMode
    hw_decoder_load: float
    """Share of the JPEG images for the hardware decoder."""
    reason: str
    is_certain: bool
    """False if a trial could not run, so the next one may find something different."""


def resolve_decode(decode: Decode, hw_decoder_load: float | None, *, device_id: int | None) -> Decoding:
    """What the settings mean on a GPU, by its ordinal, or on the CPU.

    Without a trial the hardware decoder gets no images, unless the settings give it some.

    Raises:
        ConfigError: `decode` is `auto`, and the GPU decodes in neither mode.
    """
    if decode != "auto":
        if decode == "window" and device_id is not None:
            _warn_of_old_nvjpeg()
        return Decoding(decode, hw_decoder_load or 0.0)
    if device_id is None:
        return Decoding("window", hw_decoder_load or 0.0)
    choice = choose_decode(device_id, hw_decoder_load)
    return Decoding(choice.decode, choice.hw_decoder_load)


def choose_decode(device_id: int, hw_decoder_load: float | None = None) -> DecodeChoice:
    """What works on a GPU, found by a trial in a child process the first time, and then read from a cache.

    The cache depends on the driver, the kind of GPU, DALI, nvImageCodec, the nvJPEG that this process uses, and the
    share of the hardware decoder that is asked for; None chooses it too. If several processes start at once, one of
    them runs the trial and the others wait for it.

    Raises:
        ConfigError: neither mode works.
    """
    with _cached_choice(device_id, hw_decoder_load) as (path, cached):
        if cached is not None:
            _logger.info("data.decode: auto uses %s on GPU %d: %s", _described(cached), device_id, cached.reason)
            return cached
        _logger.info("testing how GPU %d decodes, once for this driver and DALI", device_id)
        choice = pick_decode(
            lambda mode, load: try_decoding(mode, device_id=device_id, hw_decoder_load=load), hw_decoder_load
        )
        wanted = (_MODES[0], 1.0 if hw_decoder_load is None else hw_decoder_load)
        level = logging.INFO if (choice.decode, choice.hw_decoder_load) == wanted else logging.WARNING
        _logger.log(level, "data.decode: auto uses %s on GPU %d: %s", _described(choice), device_id, choice.reason)
        _save(path, choice)
        return choice


def keep_choice(device_id: int, hw_decoder_load: float | None, choice: DecodeChoice) -> None:
    """Store a choice for `choose_decode`, in place of an older one."""
    with _cached_choice(device_id, hw_decoder_load) as (path, _):
        _save(path, choice)


def pick_decode(
    trial_of: Callable[[DecodeMode, float], DecodeTrial], hw_decoder_load: float | None = None
) -> DecodeChoice:
    """The first way that works: whole images before windows, on the hardware decoder unless its share is given.

    On an H200 the hardware decoder is more than twice as fast as CUDA's, and leaves the CPU idle. With all images it
    gives the same pixels in any batch; with a part of them, whether it decodes an image depends on its neighbors. Whole
    images are as fast as windows there, and no process decodes them on the CPU; see `_warn_of_old_nvjpeg`.

    Raises:
        ConfigError: neither mode works.
    """
    tried: list[DecodeTrial] = []
    for load in (1.0, 0.0) if hw_decoder_load is None else (hw_decoder_load,):
        for mode in _MODES:
            trial = trial_of(mode, load)
            if trial.works and (trial.is_repeatable or hw_decoder_load is not None or not load):
                return _choice(trial, tried)
            tried.append(trial)
    if not any(trial.is_conclusive for trial in tried):
        return _choice(tried[-len(_MODES)], tried)
    raise ConfigError(
        f"this GPU decodes images in neither mode ({'; '.join(map(str, tried))}); set data.device: cpu, or set "
        "data.decode to window or full to skip this check"
        + ("; or set data.hw_decoder_load: 0" if hw_decoder_load else "")
        + ". kd-pipeline doctor tests all modes"
    )


def _warn_of_old_nvjpeg() -> None:
    """Warn if this process decodes windows on the CPU, as it has loaded an nvJPEG that cannot do it on a GPU.

    torchvision brings its own, older nvJPEG; if it is imported first, nvImageCodec uses that one too.
    """
    library = loaded_nvjpeg()
    if library is not None and library.version < _WINDOWS_ON_GPU_SINCE:
        found, since = (".".join(map(str, it)) for it in (library.version, _WINDOWS_ON_GPU_SINCE))
        _logger.warning(
            "data.decode: with window, the CPU decodes in this process, which has loaded nvJPEG %s: %s and later do it "
            "on the GPU, and torchvision brings an older one. Set data.decode: full",
            *(found, since),
        )


def _choice(trial: DecodeTrial, tried: Sequence[DecodeTrial]) -> DecodeChoice:
    others = [str(each) + ("; pixels depend on the batch" if each.works else "") for each in tried if each != trial]
    return DecodeChoice(
        decode=trial.decode,
        hw_decoder_load=trial.hw_decoder_load,
        reason="; ".join([*others, str(trial)]),
        is_certain=all(each.is_conclusive for each in (*tried, trial)),
    )


def _described(choice: DecodeChoice) -> str:
    return choice.decode + (f" with hw_decoder_load {choice.hw_decoder_load:g}" if choice.hw_decoder_load else "")


@contextmanager
def _cached_choice(device_id: int, hw_decoder_load: float | None) -> Iterator[tuple[Path | None, DecodeChoice | None]]:
    """Hold the lock of the cache: its file, None if there can be none, and the choice in it."""
    with ExitStack() as stack:
        path, choice = None, None
        try:
            path = user_cache("decode") / f"{_key(device_id, hw_decoder_load)}.json"
            stack.enter_context(
                locked(path, lambda: _logger.info("waiting for another process that tests GPU %d", device_id))
            )
            choice = _read(path)
        except (OSError, RuntimeError, IndexError) as exc:  # no home folder, or a driver that does not respond
            path = None
            _logger.debug("how GPU %d decodes is not cached: %s", device_id, exc)
        yield path, choice


def _key(device_id: int, hw_decoder_load: float | None) -> str:
    """Digest of everything that the choice depends on."""
    driver = query_driver()
    about: dict[str, Any] = {
        "layout": _VERSION,
        "driver": driver.version or driver.cuda,
        "gpu": driver.gpus[device_id].name,
        "dali": require("nvidia.dali", extra="cpu").__version__,
        "hw_decoder_load": hw_decoder_load,
        "other_nvjpeg": None if (library := _other_nvjpeg()) is None else library.version,
    } | {name: _installed(packages) for name, packages in _PACKAGES.items()}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _other_nvjpeg() -> Nvjpeg | None:
    """The nvJPEG that nvImageCodec gets in this process, unless it is that of DALI's packages."""
    library = loaded_nvjpeg()
    installed = {tuple(map(int, version.split(".")[:2])) for version in _installed(_PACKAGES["nvjpeg"]).values()}
    return None if library is None or library.version in installed else library


def _installed(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _read(path: Path) -> DecodeChoice | None:
    """The choice in a file of the cache; None if it is missing, damaged or not to be trusted, and is to be written."""
    try:
        return DecodeChoice.model_validate_json(read_trusted(path, max_bytes=_MAX_BYTES))
    except UntrustedFileError as exc:
        _logger.warning("%s is not used, and is written again: %s", path, exc.strerror)
    except (OSError, ValueError):
        pass
    return None


def _save(path: Path | None, choice: DecodeChoice) -> None:
    if path is not None and choice.is_certain:
        try:
            # With the umask alone, the next process might not trust it.
            write_atomic(path, choice.model_dump_json(), permissions=0o600)
        except OSError as exc:
            _logger.debug("how the GPU decodes is not cached: %s", exc)
