"""Where a build writes: paths that are checked first, the cache of engines, the lock and the temporary folder."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kd_pipeline._core.atomic_write import locked
from kd_pipeline._core.files import UntrustedFileError, check_trusted_folder, describe_special
from kd_pipeline._core.user_cache import user_cache
from kd_pipeline.errors import EngineError
from kd_pipeline.teachers.tensorrt.manifest import manifest_path
from kd_pipeline.teachers.tensorrt.parity import parity_path

__all__ = [
    "build_folder",
    "cache_folder",
    "check_folder",
    "check_paths",
    "engine_errors",
    "lock_engine",
    "make_folders",
]

_SUFFIXES = (".engine", ".plan", ".trt")
_ELSEWHERE = "choose a different file with save_engine (--save-engine)"
_OTHER_FOLDER = "choose a different folder, such as one in ~/.cache, with save_engine (--save-engine)"


def cache_folder() -> Path:
    """Return `kd_pipeline/engines` in `$XDG_CACHE_HOME` or `~/.cache`; created if needed, for this user only.

    Raises:
        EngineError: this user has no home folder, or somebody else could write to the cache.
        OSError: the folder cannot be created.
    """
    try:
        return user_cache("engines")
    except RuntimeError as exc:
        raise EngineError(f"there is no folder for engines ({exc}); set XDG_CACHE_HOME, or pass save_engine") from None
    except UntrustedFileError as exc:
        raise EngineError(
            f"no engines are cached where somebody else could replace them: {exc.strerror}; or set XDG_CACHE_HOME to a "
            "folder of yours, or build the engine in one with kd-pipeline build-engine --save-engine"
        ) from None


def check_paths(engine: Path, timing_cache: Path | None = None) -> None:
    """Refuse paths at which no engine can be written or from which none would be opened, and create missing folders.

    Raises:
        EngineError: a file that would be replaced is none or not an engine, or somebody else could replace the engine.
    """
    with engine_errors(engine):
        if engine.suffix not in _SUFFIXES and not engine.is_dir():
            raise EngineError(f"the engine would go to {engine}; call it {engine.stem}.engine")
        for path in (engine, manifest_path(engine), parity_path(engine)):
            _refuse_special(path, _ELSEWHERE)
        if timing_cache is not None:
            _refuse_special(timing_cache, "choose a different file with timing_cache (--timing-cache)")
        check_folder(engine)
        for path in (engine, timing_cache or engine):
            make_folders(path.parent)


def check_folder(engine: Path, *, otherwise: str = _OTHER_FOLDER) -> None:
    """Refuse an engine that somebody else could replace, which would then be refused when it is opened.

    `otherwise` is what else to do than to change the folder, for the message.

    Raises:
        EngineError: somebody else can write to the folder of `engine`, or to the one in which it would be created.
        OSError: the folder cannot be searched.
    """
    existing = next(level for level in engine.parents if level.is_dir())
    try:
        check_trusted_folder(existing)
    except UntrustedFileError as exc:
        raise EngineError(
            f"the engine would go to {engine}, and would be refused when it is opened: {exc.strerror}; or {otherwise}"
        ) from None


def make_folders(folder: Path) -> None:
    """Create `folder` and those above it, so that only this user can write to them whatever the umask.

    Raises:
        OSError: one cannot be created.
    """
    for level in reversed((folder, *folder.parents)):
        if not level.is_dir():  # parents=True would give the mode to the last one only
            level.mkdir(mode=0o755, exist_ok=True)


@contextmanager
def engine_errors(engine: Path | None) -> Iterator[None]:
    """Turn an `OSError` of a build into an `EngineError`."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"{error.filename or engine or 'the engine'} cannot be read or written: {error.strerror}; correct that, or "
            f"{_ELSEWHERE}"
        ) from error


@contextmanager
def lock_engine(engine: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold the lock for building `engine`; `on_wait` is called if another process holds it.

    Raises:
        EngineError: somebody put something else where the lock is.
        OSError: the lock cannot be created.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(engine, on_wait))
        except OSError as exc:
            if exc.filename is None or not os.path.lexists(exc.filename):
                raise
            raise EngineError(
                f"{exc.filename} is not the lock of a build of yours; delete it, or {_ELSEWHERE}"
            ) from None
        yield


@contextmanager
def build_folder(engine: Path) -> Iterator[Path]:
    """Make an empty folder on the filesystem of `engine`, for the holder of its lock, and remove it at the end.

    Its name is always the same, so the next build removes what a killed one left.

    Raises:
        EngineError: something is in its place that cannot be removed.
        OSError: it cannot be created.
    """
    folder = engine.with_name(f".{engine.name}.building")
    shutil.rmtree(folder, ignore_errors=True)  # not through a link
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise EngineError(f"{folder} is not from a build of yours; delete it, or {_ELSEWHERE}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_special(path: Path, elsewhere: str) -> None:
    """Raise if there is something at `path` that is no file."""
    try:
        kind = describe_special(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if kind is not None:
        raise EngineError(f"a file would go to {path}, which is {kind}; delete it, or {elsewhere}")
