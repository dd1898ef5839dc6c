"""Whether a run may resume from its checkpoint: every change since then is applied and logged, or refused."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ValidationError

from kd_pipeline._core.text import printable
from kd_pipeline.config.config import Config
from kd_pipeline.errors import StateError
from kd_pipeline.evaluation._evaluate import SCALARS
from kd_pipeline.loader.state import of_common_views
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.early_stopping import StopEarly
from kd_pipeline.training.settings import TrainSettings
from kd_pipeline.workflows.evaluation_plan import PROBE_METRIC

__all__ = ["Change", "SavedRun", "changed_settings", "check_epochs", "check_resume", "rule_of", "unusable_checkpoint"]

_MAX_SHOWN = 150
"""Characters of a value in a message."""
_MAX_LISTED = 10
"""Changes that a message lists; there may be one for each of a thousand class names."""

Rule = Literal[
    "refused", "applied", "ignored", "if same data", "if same teacher", "if not selecting", "if metric changes"
]
"""What becomes of a change. `ignored` is for settings that this stage does not use."""

_RULES: dict[str, Rule] = {
    # How fast images come. The pixels do not depend on it; device and decoder are fields of the stream.
    "data.device": "applied",
    "data.decode": "applied",
    "data.num_threads": "applied",
    "data.prefetch": "applied",
    "data.ahead": "applied",
    # With more processes it is smaller. The global batch is a field of the stream.
    "data.batch_size": "applied",
    # A run that stopped at an unreadable file resumes without it: until then none was substituted.
    "data.on_bad_sample": "applied",
    "data.max_bad_fraction": "applied",
    # Where the data is. The fingerprint says whether it is the same.
    "data.train.source": "if same data",
    # Those that student and teacher see are fields of the stream.
    "data.train.views": "applied",
    # Images that nothing is learned from, unless they have selected the best student so far.
    "data.val": "if not selecting",
    "data.more": "if not selecting",
    "data.test": "applied",
    "train.limit_val_batches": "if not selecting",
    "train.metrics": "if not selecting",
    "train.validate": "if not selecting",
    # Where the teacher is, and what runs it. The fingerprint covers weights, precision and runtime.
    "teacher": "if same teacher",
    "probe": "applied",
    # What the features are measured by, unless that has selected the best student so far.
    "feature_probe": "if not selecting",
    "feature_probe.sets": "applied",
    "feature_probe.every": "applied",
    "feature_probe.linear": "applied",
    # The number of logits is compared itself.
    "student.num_classes": "applied",
    # How long. `check_epochs` refuses fewer than are done.
    "train.epochs": "applied",
    # A run that a loss of NaN has stopped resumes without that step.
    "train.max_nonfinite_steps": "applied",
    # The callbacks start over where their metric changes. With a different `mode` the best value would be the worst.
    "train.early_stopping": "applied",
    "train.early_stopping.mode": "if metric changes",
    "train.select_by": "applied",
    "train.select_mode": "applied",
    # What is watched, saved and exported, and how fast it is computed.
    "train.callbacks": "applied",
    "train.compare_with_teacher": "applied",
    "train.channels_last": "applied",
    "train.compile": "applied",
    "train.deterministic": "applied",
    "train.export": "applied",
    "train.log_every_steps": "applied",
    "train.log_gradient_norm": "applied",
    "train.loggers": "applied",
    "train.num_threads": "applied",
    "train.save_every_steps": "applied",
    "train.validate_every_steps": "applied",
}
"""By key of the config, for it and all below it; the longest key decides. All others are refused: they change what is
learned, and the checkpoint holds the beginning of something else."""
_WITHOUT_TEACHER: dict[str, Rule] = {
    "distill": "ignored",
    "distill.label_smoothing": "refused",
    "distill.heads": "refused",
    "distill.student_losses": "refused",
    "distill.task_loss": "refused",
    "probe": "ignored",
    "student_from_teacher": "ignored",
    "teacher": "ignored",
    "train.compare_with_teacher": "ignored",
}
_RULES_OF_STAGE: dict[str, dict[str, Rule]] = {
    "baseline": _WITHOUT_TEACHER,
    "teacher": {
        **_WITHOUT_TEACHER,
        "distill.heads": "ignored",
        "distill.student_losses": "ignored",
        "feature_probe": "ignored",
        "student": "ignored",
        "student.num_classes": "ignored",
        "teacher.model": "refused",
        "teacher.model.num_classes": "applied",
    },
}

_AFTER_TRAINING = dict.fromkeys(
    (
        *("data.more", "data.test", "data.val", "feature_probe", "teacher", "train.export"),
        *("train.limit_val_batches", "train.metrics", "train.validate"),
    )
)
"""What the results of a finished run depend on."""
_NOTES = {
    "train.epochs": "learning rate and ramps now follow a run of the new length",
    "train.select_by": "the best score starts over",
    "train.select_mode": "the best score starts over",
    "classes": "class names of the data, in label order",
    "data": "the training images, labels or classes are different ones",
    "num_classes": "number of logits",
    "objects": "objects that train was called with",
    "stream.dali": "version of nvidia-dali",
    "stream.decode": "how this GPU decodes images",
    "stream.device": "kind of device that decodes images",
    "stream.global_batch_size": "data.batch_size x processes",
    "stream.shards": "shards of the training data with different numbers of samples",
    "teacher": "a teacher with different weights, precision or runtime",
    "teacher_runtimes": "backend and precision of the teacher",
}
_GLOBAL_SHUFFLES = (None, True, "global")
"""Values of `data.train.shuffle` that are the same."""


@dataclass(frozen=True, slots=True)
class Change:
    """A difference between the run in a checkpoint and the run that would resume from it."""

    key: str
    """Dotted, as on the command line."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{printable(self.key.removeprefix('stream.'))}: {_show(self.old)} → {_show(self.new)}"

    @property
    def line(self) -> str:
        """What was changed, and what that means."""
        note = _NOTES.get(self.key)
        return f"{self}" if note is None else f"{self} ({note})"

    @property
    def line_of_finished_run(self) -> str:
        """The same for a run that has nothing left to train."""
        if self.key == "train.epochs":
            return f"{self} (the learning rate and the ramps were those of a run of {self.old})"
        if _longest_rule(self.key, _AFTER_TRAINING) is None:
            return f"{self} (without effect, as nothing is left to train)"
        return f"{self}"


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
    old_config, new_config = _config(saved), current["config"]
    identity = {name for name in current if name not in ("config", "validation")}
    refused = list(_changes({name: saved.get(name) for name in identity}, {name: current[name] for name in identity}))
    refused = [change for change in refused if change.key != "stream.on_bad_sample"]  # the config has it
    different = {re.split(r"[.\[]", change.key)[0] for change in refused}
    selecting = _Selecting(old_config, new_config)
    validation = _changes(dict(saved.get("validation", {})), dict(current.get("validation", {})))
    refused += [
        Change(f"data.{'' if each.key == 'val' else 'more.'}{each.key}.source", each.old, each.new)
        for each in validation
        if each.key in selecting.splits and None not in (each.old, each.new)
    ]
    applied: list[Change] = []
    for change in _changes(old_config, new_config):
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


def changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """The settings that two configs, in plain values, do not have in common; both may be of an earlier release.

    Raises:
        StateError: `saved` is no config.
    """
    try:
        return [*_changes(_config({"config": saved}), _config({"config": current}))]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
        reason = printable(f"{type(exc).__name__}: {exc}".partition("\n")[0])[:_MAX_SHOWN]
        raise StateError(f"the run does not say which config made it ({reason})") from exc


def unusable_checkpoint(path: Path | None, exc: Exception) -> StateError:
    """The error for a checkpoint that loads, and does not hold what a run has saved."""
    reason = printable(f"{type(exc).__name__}: {exc}".partition("\n")[0])[:_MAX_SHOWN]
    assert path is not None
    return StateError(
        f"{path} does not hold what kd-pipeline train resumes from ({reason}); use a different one, or "
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


def rule_of(key: str, stage: str) -> Rule:
    """What becomes of a change of `key` when `stage` resumes; entries of lists are `key[0]`."""
    rules = _RULES | _RULES_OF_STAGE.get(stage, {})
    found = _longest_rule(key, rules)
    return "refused" if found is None else rules[found]


def _longest_rule(key: str, rules: Mapping[str, Any]) -> str | None:
    """The longest key of `rules` that is `key` or above it."""
    names = re.split(r"\.|\[", key)
    above = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((name for name in above if name in rules), None)


class _Selecting:
    """Which validation metrics were compared with each other so far, and still would be."""

    def __init__(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        metrics = {
            before
            for before, after in zip(_metrics(old), _metrics(new), strict=True)
            if before is not None and before == after
        }
        named = [metric[0].rpartition("/") for metric in metrics]
        measured = _splits(old["data"])
        self._is_probe = any(PROBE_METRIC.fullmatch(name) for _, _, name in named)
        self.splits = {split for split, _, _ in named if split in measured}
        if self._is_probe and old.get("feature_probe") and old["feature_probe"]["bank"] in measured:
            self.splits.add(old["feature_probe"]["bank"])
        before, after = _metrics(old)[1], _metrics(new)[1]
        self.stops_by_other_metric = before is not None and after is not None and before[0] != after[0]
        """Whether early stopping starts over."""
        self._is_custom = any(
            name not in SCALARS and not PROBE_METRIC.fullmatch(name) for split, _, name in named if split in self.splits
        )

    def depends_on(self, change: Change) -> bool:
        """Whether the old and the new best score would be measured in different ways."""
        match change.key.split("."):
            case ["data", "val", "source", *_] | ["data", "more", _, "source", *_]:
                return False  # the fingerprints are compared
            case ["data", "val", *_]:
                return "val" in self.splits
            case ["data", "more", split, *_]:
                return split in self.splits
            case ["feature_probe", *below]:
                return bool(below) and self._is_probe
            case ["train", "limit_val_batches"]:
                return bool(self.splits)
            case ["train", "validate"]:  # without a name, what it returned may have selected
                return change.old is not None or bool(self.splits)
            case _:
                return self._is_custom


def _metrics(config: Mapping[str, Any]) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    """Metric and mode that select the best student, and that stop the run."""
    train = config["train"]
    stopping = train["early_stopping"]
    best = None if train["select_by"] is None else (train["select_by"], train["select_mode"])
    return best, None if stopping is None else (stopping["metric"], stopping["mode"])


def _splits(data: Mapping[str, Any]) -> set[str]:
    return {name for name in ("val",) if data[name] is not None} | {*data["more"]}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a number of steps or epochs is {value!r}")
    return value


def _config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a checkpoint; settings that are newer than it have their defaults, with which it ran."""
    config: dict[str, Any] = dict(saved["config"])
    try:
        return Config.model_validate(config).model_dump(mode="json")
    except ValidationError:
        return config


def _changes(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    match old, new:
        case Mapping(), Mapping():
            for name in {**old, **new}:
                yield from _changes(old.get(name), new.get(name), f"{key}.{name}".removeprefix("."))
        case ((list() | tuple()), (list() | tuple())) if len(old) == len(new) and not _is_short([*old, *new]):
            for position, entries in enumerate(zip(old, new, strict=True)):
                yield from _changes(*entries, f"{key}[{position}]")
        case ((list() | tuple()), (list() | tuple())) if max(len(old), len(new)) > _MAX_LISTED:
            yield Change(key, f"{len(old)} entries", f"{len(new)} entries")
        case _ if old != new:
            yield Change(key, old, new)


def _is_short(values: list[Any]) -> bool:
    """Whether a list is shown as a whole, such as the mean of three channels."""
    return len(values) <= _MAX_LISTED and not any(isinstance(value, Mapping | list | tuple) for value in values)


def _show(value: Any) -> str:
    """A value as in a config file, on one line; a fingerprint by its first digits."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"fingerprint {value[:12]}"
    try:
        text = yaml.safe_dump(_without_none(value), default_flow_style=True, sort_keys=False, width=math.inf)
    except (yaml.YAMLError, RecursionError):  # no config has such a value
        text = f"a {type(value).__name__}"
    text = printable(text.removesuffix("...\n").strip())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [*value] if isinstance(value, tuple) else value


def _refuse(changes: list[Change], folder: Path, stage: str) -> None:
    lines = [f"  {change.line}\n" for change in changes[:_MAX_LISTED]]
    if len(changes) > _MAX_LISTED:
        lines.append(f"  and {len(changes) - _MAX_LISTED} more\n")
    raise StateError(
        f"{folder} holds a run of stage {stage} with different settings, which these would not continue:\n"
        f"{''.join(lines)}restore the old values to resume it, or {_way_out(folder)}"
    )


def _way_out(folder: Path) -> str:
    return (
        f"start again with --fresh (in Python fresh=True), which moves the earlier run to {folder / 'earlier'}, or "
        "set a different run_dir"
    )
