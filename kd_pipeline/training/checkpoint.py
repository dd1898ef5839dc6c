"""Checkpoints that neither a kill nor a full disk can break, what goes into them, and when they are written."""

import glob
import math
import os
import re
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from kd_pipeline._core.atomic_write import whole_file
from kd_pipeline._core.optional import require
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.training.rng import capture_rng, restore_rng

__all__ = [
    "CheckpointCallback",
    "SaveLastAndBest",
    "atomic_checkpoint_io",
    "check_same_run",
    "is_resumable_after",
    "load_checkpoint",
    "save_checkpoint",
]

_logger = getLogger(__name__)

_MAPPINGS = {dict, OrderedDict, Counter}
_SEQUENCES = {list, tuple, set}
_LEAVES = {
    *(NoneType, bool, int, float, complex, str, bytes, bytearray),
    *(Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device, torch.layout),
}
"""Exact types that `torch.load(weights_only=True)` takes: numpy.float64 is a float and is not taken."""
_MOST_DIFFERENCES = 10
"""Lines about two runs that differ, which may do so in each of a thousand class names."""


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Replace `path` by a file that holds `checkpoint`, all at once: whatever happens, it is the old one or the new.

    A killed run may leave a temporary file behind; the next save to `path` removes it.

    Raises:
        StateError: a value would not load again without running code, and nothing was written; or the disk is full or
            refuses, and the old file is untouched.
    """
    path = Path(path)
    _check_plain(checkpoint, "checkpoint")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_behind in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            left_behind.unlink(missing_ok=True)
        with whole_file(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as exc:
        # torch answers a failed write with a riddle about file positions; Python's own error is behind it.
        reason = exc.__context__ if isinstance(exc.__context__, OSError) else exc
        raise StateError(
            f"the checkpoint {path} cannot be written: {reason}{_free_space(path.parent)}. What was saved there before "
            "is untouched; remove the cause and start the same command again"
        ) from exc
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """What `save_checkpoint`, or Lightning with it, wrote. No code in the file is ever run.

    Args:
        path: the file.
        map_location: where the tensors go, in any form that `torch.load` takes.

    Raises:
        StateError: there is no such file, or it is cut off, damaged, holds more than plain data or is no checkpoint.
    """
    way_out = "pass another one, such as best.ckpt or last.ckpt beside it, or remove it and start anew"
    try:
        with zipfile.ZipFile(path) as archive:
            # The sums are there, but torch does not look at them.
            if (changed := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{changed} has changed since it was written")
        loaded = torch.load(path, map_location, weights_only=True)
    except FileNotFoundError:
        raise StateError(f"there is no checkpoint {path}; {way_out}") from None
    except Exception as exc:  # the unpickler raises whatever the bytes lead it to
        raise StateError(f"{path} is no checkpoint that can be loaded: {_why_unreadable(exc)}; {way_out}") from exc
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        found = f"the keys {[*loaded][:5]}" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise StateError(f"{path} is no checkpoint of a training: it holds {found}, and no 'state_dict'; {way_out}")
    return loaded


def atomic_checkpoint_io() -> Any:
    """Lightning's `CheckpointIO` by `save_checkpoint` and `load_checkpoint`, for `Trainer(plugins=...)`.

    Lightning's own writes to TMPDIR and moves: on another disk that is a copy, which a kill cuts off and for which a
    full disk gives up the previous file.

    Raises:
        MissingPackageError: Lightning is not installed.
    """
    base: Any = require("lightning.fabric.plugins", extra="train").CheckpointIO

    class AtomicCheckpointIO(base):  # type: ignore[misc]
        def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
            save_checkpoint(checkpoint, path)

        def load_checkpoint(
            self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
        ) -> dict[str, Any]:
            return load_checkpoint(path, map_location or "cpu")

        def remove_checkpoint(self, path: str | Path) -> None:
            Path(path).unlink(missing_ok=True)

    return AtomicCheckpointIO()


def is_resumable_after(trainer: Any, batch_idx: int) -> bool:
    """Whether a checkpoint taken at the end of this training batch would be resumed exactly.

    Not within an accumulation, because gradients are not saved. Not behind the last batch of an epoch, because
    Lightning resumes there with the next epoch and leaves out the end of this one, validation included.
    """
    return not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class CheckpointCallback:
    """Base of a callback that Lightning calls after all others, when they have done what is to be saved.

    It is a `lightning.pytorch.callbacks.Checkpoint` once it is made, so that this module imports without Lightning.
    Hooks of the `LightningModule` at the end of a batch come later still: what they change is not in a checkpoint.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance of this class laid over Lightning's.

        Raises:
            MissingPackageError: Lightning is not installed.
        """
        base: Any = require("lightning.pytorch.callbacks", extra="train").Checkpoint
        return object.__new__(type(cls.__name__, (cls, base), {}))


class SaveLastAndBest(CheckpointCallback):
    """Keeps `last.ckpt`, `best.ckpt` and, of the latter, the student alone as `best_student.pt`.

    Not Lightning's `ModelCheckpoint`: with a number of steps that one also saves behind the last batch of an epoch,
    takes the epoch's end for saved with it, and when resumed never makes up for it; it saves per step or per epoch, not
    both; it takes NaN for a score; and in a run folder that was moved it forgets the best score.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        student: Callable[[], dict[str, Tensor]],
        monitor: str | None,
        mode: Literal["max", "min"] = "max",
        every_n_steps: int | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
        validate_every_n_steps: int | None = None,
    ) -> None:
        """Save into `folder`, at the end of every epoch.

        Args:
            folder: made when it is not there.
            student: the weights that `monitor` was measured with, those of the moving average where one is kept.
            monitor: metric, logged in every epoch, that the best student has most or least of; None keeps no best.
            mode: whether most or least.
            every_n_steps: steps of the optimizer between saves of `last.ckpt` within an epoch; none unless given.
            validate: logs what `monitor` is among and returns it; for validations within an epoch.
            validate_every_n_steps: steps of the optimizer between those; none unless given.

        Raises:
            MissingPackageError: Lightning is not installed.
        """
        self._folder, self._student, self._every_n_steps = Path(folder), student, every_n_steps
        self._monitor, self._mode = monitor, mode
        self._validate, self._validate_every_n_steps = validate, validate_every_n_steps
        self._rng: list[dict[str, Any]] | None = None
        self.best_score = -math.inf if mode == "max" else math.inf

    def state_dict(self) -> dict[str, Any]:
        """The best score and what it is a score of, and the random generators of all ranks; to be called on all."""
        score = {"monitor": self._monitor, "mode": self._mode, "best_score": self.best_score}
        return {**score, "rng": capture_rng()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the best score, unless it is one of another metric, and from `on_train_start` the generators."""
        if (state["monitor"], state["mode"]) == (self._monitor, self._mode):
            self.best_score = state["best_score"]
        else:
            _logger.warning("the best student is looked for anew: it went by %s before", state["monitor"])
        self._rng = state["rng"]

    def save_last(self, trainer: Any) -> None:
        """Save `last.ckpt` now; to be called on all ranks.

        Raises:
            StateError: it cannot be written.
        """
        trainer.save_checkpoint(self._folder / "last.ckpt")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Put the random generators where they were saved."""
        if self._rng is not None:
            restore_rng(self._rng)
            self._rng = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Validate every so many steps, and save every so many.

        The save comes second and knows of the validation. Behind the last batch of an epoch there is neither, as the
        end of the epoch has both.
        """
        if not is_resumable_after(trainer, batch_idx):
            return
        step = trainer.global_step
        if self._validate is not None and _is_due(step, self._validate_every_n_steps):
            self._save_if_best(trainer, self._validate())
        if _is_due(step, self._every_n_steps):
            self.save_last(trainer)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Save the epoch, and the student as well if it is the best so far.

        Raises:
            ConfigError: nothing has logged the metric.
            StateError: a file cannot be written.
        """
        self._save_if_best(trainer, trainer.callback_metrics)
        self.save_last(trainer)

    def _save_if_best(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        """Before last.ckpt, which says that it is there: a run killed in between validates once more."""
        if self._is_best(trainer, metrics):
            trainer.save_checkpoint(self._folder / "best.ckpt")
            student = self._student()  # which all ranks may have to put together
            if trainer.is_global_zero:
                save_checkpoint(student, self._folder / "best_student.pt")

    def _is_best(self, trainer: Any, metrics: Mapping[str, Any]) -> bool:
        if self._monitor is None:
            return False
        if self._monitor not in metrics:
            raise ConfigError(
                f"no metric {self._monitor!r} to tell the best by; there are {', '.join(sorted(metrics))}"
            )
        # The first rank decides for all: they save together, and their figures may differ in the last digit.
        score = trainer.strategy.broadcast(float(metrics[self._monitor]))
        is_better: bool = score > self.best_score if self._mode == "max" else score < self.best_score
        if is_better:
            self.best_score = score
        return is_better


def _is_due(step: int, every_n_steps: int | None) -> bool:
    return every_n_steps is not None and step % every_n_steps == 0


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what identifies a run, such as its teacher, class list and data set, with what a checkpoint says of it.

    Raises:
        StateError: one line for each difference, old → new, entries of lists and mappings by their own names.
    """
    lines = [
        difference for name in {**saved, **now} for difference in _differences(name, saved.get(name), now.get(name))
    ]
    if lines:
        more = len(lines) - _MOST_DIFFERENCES
        shown = lines[:_MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
        raise StateError(
            "the checkpoint belongs to another run:\n"
            + "".join(f"  {line}\n" for line in shown)
            + "resume with the old values, or start a run of another name"
        )


def _differences(name: str, old: Any, new: Any) -> Iterator[str]:
    match old, new:
        case Mapping(), Mapping():
            for key in {**old, **new}:
                yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
        case ((list() | tuple()), (list() | tuple())) if len(old) != len(new):
            yield f"{name}: {len(old)} entries → {len(new)} entries"
        case ((list() | tuple()), (list() | tuple())):
            for position, entries in enumerate(zip(old, new, strict=True)):
                yield from _differences(f"{name}[{position}]", *entries)
        case _ if old != new:
            yield f"{name}: {old!r:.100} → {new!r:.100}"


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `load_checkpoint` would refuse, while the key under which it stands is known."""
    kind = type(value)
    if kind in _MAPPINGS:
        for key, item in value.items():
            _check_plain(key, f"the key {key!r} of {where}")
            _check_plain(item, f"{where}[{key!r}]")
        _check_plain([*getattr(value, "__dict__", {}).values()], f"an attribute of {where}")
    elif kind in _SEQUENCES:
        for position, item in enumerate(value):
            _check_plain(item, f"{where}[{position}]")
    elif kind not in _LEAVES:
        raise StateError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}, which does not load again without running code; save "
            "tensors, numbers, strings, bytes, lists, tuples, sets and dicts: str(path), array.tolist(), number.item()"
        )


def _why_unreadable(exc: Exception) -> str:
    """In one line; torch's own text is long and advises to run the code in the file."""
    text = str(exc)
    if foreign := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {foreign[1]}, and a checkpoint holds plain data only"
    if isinstance(exc, OSError):
        return text
    return f"it is cut off, damaged or something else ({type(exc).__name__}: {text.splitlines()[0] if text else ''})"


def _free_space(folder: Path) -> str:
    return f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB are free there)" if folder.is_dir() else ""


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk; where a filesystem cannot do that for folders, the file itself is there."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
