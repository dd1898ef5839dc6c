"""Which way of decoding a loader takes: what settings say, or on a GPU what works there, tried out once and kept."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from kd_pipeline._core.atomic_write import locked, write_whole
from kd_pipeline._core.nvidia_driver import ask_driver
from kd_pipeline._core.optional import require
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline.data.dali import DecodeWay
from kd_pipeline.data.decode_trial import DecodeTrial, try_decoding
from kd_pipeline.errors import ConfigError

__all__ = ["Decode", "DecodeChoice", "choose_decode", "keep_choice", "pick_decode", "resolve_decode"]

Decode = Literal["auto", "window", "full"]
"""What settings may say; `auto` is `window` on a CPU, and on a GPU what `choose_decode` finds."""

_logger = logging.getLogger("kd_pipeline")

_LAYOUT = 1
"""To be raised whenever the trial looks at something else."""
_WINDOWS_ON_GPU_SINCE = (13, 2)
"""The first nvJPEG whose windows nvImageCodec decodes on a GPU with fancy upsampling; before it they go to the CPU."""
_PACKAGES = {
    "nvimgcodec": ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
    "nvjpeg": ("nvidia-nvjpeg", "nvidia-nvjpeg-cu12"),
}


class DecodeChoice(Settings):
    """The way that `auto` takes on a GPU."""

    decode: DecodeWay
    reason: str
    is_certain: bool
    """False where a trial could not be made, so that another one may answer differently."""


def resolve_decode(decode: Decode, *, device_id: int | None, hw_decoder_load: float) -> DecodeWay:
    """The way that `decode` means on a GPU by its ordinal, or on the CPU.

    Raises:
        ConfigError: it is `auto`, and the GPU decodes in neither way.
    """
    if decode != "auto":
        return decode
    if device_id is None:
        return "window"
    return choose_decode(device_id, hw_decoder_load).decode


def choose_decode(device_id: int, hw_decoder_load: float) -> DecodeChoice:
    """The way that works on a GPU: tried out in a process of its own the first time, and read back from then on.

    The answer is kept for this driver, kind of GPU, DALI, nvImageCodec and nvJPEG, and this share of the hardware
    decoder. Where several processes ask at once, one of them tries and the others wait for its answer.

    Raises:
        ConfigError: neither way works.
    """
    with _kept_answer(device_id, hw_decoder_load) as (path, kept):
        if kept is not None:
            _logger.info("data.decode: auto takes %s on GPU %d: %s", kept.decode, device_id, kept.reason)
            return kept
        _logger.info("trying out how GPU %d decodes, once for this driver and DALI", device_id)
        trial = partial(try_decoding, device_id=device_id, hw_decoder_load=hw_decoder_load)
        choice = pick_decode(trial("window"), lambda: trial("full"))
        level = logging.INFO if choice.decode == "window" else logging.WARNING
        _logger.log(level, "data.decode: auto takes %s on GPU %d: %s", choice.decode, device_id, choice.reason)
        _write(path, choice)
        return choice


def keep_choice(device_id: int, hw_decoder_load: float, choice: DecodeChoice) -> None:
    """Let `choose_decode` find an answer that was found elsewhere, in place of an older one."""
    with _kept_answer(device_id, hw_decoder_load) as (path, _):
        _write(path, choice)


def pick_decode(window: DecodeTrial, try_full: Callable[[], DecodeTrial]) -> DecodeChoice:
    """The better of the ways that work: windows, unless the GPU would leave them to the CPU.

    Raises:
        ConfigError: neither works.
    """
    if window.works and (window.nvjpeg or _WINDOWS_ON_GPU_SINCE) >= _WINDOWS_ON_GPU_SINCE:
        return DecodeChoice(decode="window", reason=str(window), is_certain=True)
    full = try_full()
    is_certain = window.has_answered and full.has_answered
    if window.works and full.works:
        version, since = (".".join(map(str, it)) for it in (window.nvjpeg or (), _WINDOWS_ON_GPU_SINCE))
        reason = f"nvJPEG {version} would decode windows on the CPU, {since} and later do it on the GPU; {full}"
        return DecodeChoice(decode="full", reason=reason, is_certain=is_certain)
    if full.works or not (window.has_answered or full.has_answered):
        return DecodeChoice(decode="full", reason=f"{window}; {full}", is_certain=is_certain)
    if window.works:
        return DecodeChoice(decode="window", reason=f"{window}; {full}", is_certain=is_certain)
    raise ConfigError(
        f"this GPU decodes pictures in neither way ({window}; {full}); set data.device: cpu, or data.decode to window "
        "or full to go on without this check"
        + ("; or set data.hw_decoder_load: 0" if window.hw_decoder_load else "")
        + ". kd-pipeline doctor tries all of them"
    )


@contextmanager
def _kept_answer(device_id: int, hw_decoder_load: float) -> Iterator[tuple[Path | None, DecodeChoice | None]]:
    """Where the answer is kept, for whoever holds its lock, and the answer; None where nothing can be kept."""
    with ExitStack() as stack:
        path, kept = None, None
        try:
            path = user_cache("decode") / f"{_key(device_id, hw_decoder_load)}.json"
            stack.enter_context(
                locked(path, lambda: _logger.info("waiting: another process tries out GPU %d", device_id))
            )
            kept = _read(path)
        except (OSError, RuntimeError, IndexError) as exc:  # no home folder, or a driver that does not answer
            path = None
            _logger.debug("how GPU %d decodes is not kept: %s", device_id, exc)
        yield path, kept


def _key(device_id: int, hw_decoder_load: float) -> str:
    """Digest of everything that the answer depends on."""
    driver = ask_driver()
    about: dict[str, Any] = {
        "layout": _LAYOUT,
        "driver": driver.version or driver.cuda,
        "gpu": driver.gpus[device_id].name,
        "dali": require("nvidia.dali", extra="cpu").__version__,
        "hw_decoder_load": hw_decoder_load,
    } | {name: _installed(packages) for name, packages in _PACKAGES.items()}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _installed(packages: Sequence[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _read(path: Path) -> DecodeChoice | None:
    try:
        return DecodeChoice.model_validate_json(path.read_bytes())
    except (OSError, ValueError):  # none there, or a damaged one, which is replaced
        return None


def _write(path: Path | None, choice: DecodeChoice) -> None:
    if path is not None and choice.is_certain:
        try:
            write_whole(path, choice.model_dump_json())
        except OSError as exc:
            _logger.debug("how the GPU decodes is not kept: %s", exc)
