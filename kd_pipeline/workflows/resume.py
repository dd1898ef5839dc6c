"""Whether a run may resume from its checkpoint: every change since then is applied and logged, or refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kd_pipeline.config.config import Config
from kd_pipeline.errors import StateError
from kd_pipeline.loader.state import of_common_views
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.early_stopping import StopEarly
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.workflows.resume_rules import Selecting, changes_results, rule_of
from kd_pipeline.workflows.setting_changes import MAX_LISTED, Change, changes_of, reason_of, with_defaults

__all__ = ["SavedRun", "check_epochs", "check_resume", "effect_on_finished_run", "unusable_checkpoint"]

_GLOBAL_SHUFFLES = (None, True, "global")
"""Values of `data.train.shuffle` that are the same."""


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What a checkpoint says about its run, without its weights."""

    run: Mapping[str, Any]
    """Its config, and what else identifies it; see `check_resume`."""
    step: int
    epochs_done: int
    is_within_epoch: bool
    """Whether it also holds a part of the next epoch."""
    early_stopping: Mapping[str, Any] | None
    """State of early stopping, if there was one."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the checkpoint of a run.

        Raises:
            StateError: it cannot be read, or is not the checkpoint of a run.
        """
        checkpoint = load_checkpoint(path)
        try:
            epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
            found = cls(
                run={**checkpoint["run"]},
                step=_count(checkpoint["global_step"]),
                epochs_done=_count(epochs["processed"]),
                is_within_epoch=_count(epochs["ready"]) > epochs["processed"],
                early_stopping=checkpoint["callbacks"].get(StopEarly.__qualname__),
            )
            if found.early_stopping is not None:
                _count(found.early_stopping["num_waited"])
        except KeyError as exc:
            raise StateError(
                f"{path} is not the checkpoint of kd-pipeline train: it has no {exc}; {_way_out(path.parent.parent)}"
            ) from None
        except (AttributeError, TypeError, ValueError) as exc:
            raise unusable_checkpoint(path, exc) from None
        return found

    def check(self, identity: Mapping[str, Any], config: Config, folder: Path) -> list[Change]:
        """The changes since the checkpoint was saved, all of which can be applied; see `check_resume`.

        Raises:
            StateError: some cannot, or the run is to be shorter than it already is.
        """
        changes = check_resume(self.run, identity, folder)
        check_epochs(self.epochs_done, self.is_within_epoch, config.train.epochs, folder)
        return changes

    def place(self, epochs: int) -> str:
        """Where a run of so many epochs resumes, for people."""
        return f"at epoch {self.epochs_done + 1} of {epochs}, step {self.step}"

    def finished_line(self, train: TrainSettings) -> str | None:
        """If nothing is left to train: that it is so, and what to set to train longer."""
        done = f"{self.epochs_done} of {train.epochs} epochs"
        again = "to start again pass --fresh (in Python fresh=True) or set another run_dir"
        if self.epochs_done >= train.epochs:
            return f"finished: {done}; to train longer set train.epochs, {again}"
        if train.early_stopping is not None and self.early_stopping is not None:
            stopping = StopEarly(train.early_stopping)
            stopping.load_state_dict(dict(self.early_stopping))
            if stopping.is_over and not self.is_within_epoch:
                metric, patience = train.early_stopping.metric, train.early_stopping.patience
                return (
                    f"finished: {done}, stopped early as {metric} has not improved for {patience}; to train longer set "
                    f"train.early_stopping.patience, {again}"
                )
        return None


def check_resume(saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> list[Change]:
    """The changes of the config since a checkpoint was saved, all of which can be applied.

    Args:
        saved: what a checkpoint holds about its run: `config`, and what else identifies it, such as the fingerprints
            of data and teacher, and `validation`, those of the validation sets by name.
        current: the same of this run; what it lacks is not compared.
        folder: of the run, for messages.

    Raises:
        StateError: some cannot; one line `key: old → new` for each of these.
    """
    if "config" not in saved:
        raise StateError(f"the checkpoint in {folder} does not say which config made it; {_way_out(folder)}")
    if isinstance(saved.get("stream"), Mapping) and isinstance(current.get("stream"), Mapping):
        # A run with several students has the views of all of them.
        ours, theirs = of_common_views(saved["stream"], current["stream"])
        saved, current = {**saved, "stream": ours}, {**current, "stream": theirs}
    try:
        applied, refused = _sorted_changes(saved, current)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:  # of plain data of any shape
        raise unusable_checkpoint(folder / "checkpoints" / "last.ckpt", exc) from exc
    if refused:
        _refuse(refused, folder, current["config"]["stage"])
    return applied


def _sorted_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[list[Change], list[Change]]:
    """The changes that are applied, and those that are refused."""
    old_config, new_config = with_defaults(saved["config"]), current["config"]
    identity = {name for name in current if name not in ("config", "validation")}
    refused = list(changes_of({name: saved.get(name) for name in identity}, {name: current[name] for name in identity}))
    refused = [change for change in refused if change.key != "stream.on_bad_sample"]  # the config has it
    different = {re.split(r"[.\[]", change.key)[0] for change in refused}
    selecting = Selecting(old_config, new_config)
    validation = changes_of(dict(saved.get("validation", {})), dict(current.get("validation", {})))
    refused += [
        Change(f"data.{'' if each.key == 'val' else 'more.'}{each.key}.source", each.old, each.new)
        for each in validation
        if each.key in selecting.splits and None not in (each.old, each.new)
    ]
    applied: list[Change] = []
    for change in changes_of(old_config, new_config):
        if change.key == "run_dir":  # the folder was moved, or is spelled differently
            continue
        if change.key == "data.train.shuffle" and all(each in _GLOBAL_SHUFFLES for each in (change.old, change.new)):
            continue
        if change.key == "train.epochs" and old_config["train"]["schedule"].get("factory") is not None:
            why = "the scheduler of train.schedule.factory keeps its length"
            refused.append(Change(f"train.epochs ({why})", change.old, change.new))
            continue
        match rule_of(change.key, new_config["stage"]):
            case "refused":
                is_applied = False
            case "if same data":
                is_applied = not {"data", "classes"} & different
            case "if same teacher":
                is_applied = "teacher" not in different
            case "if not selecting":
                is_applied = not selecting.depends_on(change)
            case "if metric changes":
                is_applied = selecting.stops_by_other_metric
            case "ignored":
                continue
            case "applied":
                is_applied = True
        (applied if is_applied else refused).append(change)
    return applied, refused


def effect_on_finished_run(change: Change) -> str:
    """A change, and what it means for a run that has nothing left to train."""
    if change.key == "train.epochs":
        return f"{change} (the learning rate and the ramps were those of a run of {change.old})"
    if not changes_results(change.key):
        return f"{change} (without effect, as nothing is left to train)"
    return f"{change}"


def unusable_checkpoint(path: Path | None, exc: Exception) -> StateError:
    """The error for a checkpoint that loads, and does not hold what a run has saved."""
    assert path is not None
    return StateError(
        f"{path} does not hold what kd-pipeline train resumes from ({reason_of(exc)}); use a different one, or "
        f"{_way_out(path.parent.parent)}"
    )


def check_epochs(done: int, is_within_epoch: bool, epochs: int, folder: Path) -> None:
    """Check that a run of `epochs` is not shorter than what was trained already.

    Args:
        done: complete epochs in the checkpoint.
        is_within_epoch: whether it also holds a part of the next one.
        epochs: `train.epochs` now.
        folder: of the run, for the message.

    Raises:
        StateError: it is.
    """
    needed = done + is_within_epoch
    if epochs < needed:
        what = f"{done} and a part of the next" if is_within_epoch else str(done)
        raise StateError(
            f"train.epochs is {epochs}, and the run in {folder} has trained for {what}; set train.epochs to at least "
            f"{needed}, or {_way_out(folder)}"
        )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a number of steps or epochs is {value!r}")
    return value


def _refuse(changes: list[Change], folder: Path, stage: str) -> None:
    lines = [f"  {change.line}\n" for change in changes[:MAX_LISTED]]
    if len(changes) > MAX_LISTED:
        lines.append(f"  and {len(changes) - MAX_LISTED} more\n")
    raise StateError(
        f"{folder} holds a run of stage {stage} with different settings, which these would not continue:\n"
        f"{''.join(lines)}restore the old values to resume it, or {_way_out(folder)}"
    )


def _way_out(folder: Path) -> str:
    return (
        f"start again with --fresh (in Python fresh=True), which moves the earlier run to {folder / 'earlier'}, or "
        "set a different run_dir"
    )
