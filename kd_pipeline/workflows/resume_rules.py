"""What becomes of each changed setting when a run resumes: a rule by its key, and whether a best score still counts."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from kd_pipeline.evaluation._evaluate import SCALARS
from kd_pipeline.workflows.evaluation_plan import PROBE_METRIC
from kd_pipeline.workflows.setting_changes import Change

__all__ = ["RULES", "RULES_OF_STAGE", "Rule", "Selecting", "changes_results", "rule_of"]

Rule = Literal[
    "refused", "applied", "ignored", "if same data", "if same teacher", "if not selecting", "if metric changes"
]
"""What becomes of a change. `ignored` is for settings that this stage does not use."""

RULES: dict[str, Rule] = {
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
RULES_OF_STAGE: dict[str, dict[str, Rule]] = {
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


def rule_of(key: str, stage: str) -> Rule:
    """What becomes of a change of `key` when `stage` resumes; entries of lists are `key[0]`."""
    rules = RULES | RULES_OF_STAGE.get(stage, {})
    found = _longest_rule(key, rules)
    return "refused" if found is None else rules[found]


def changes_results(key: str) -> bool:
    """Whether the results of a finished run depend on a setting."""
    return _longest_rule(key, _AFTER_TRAINING) is not None


def _longest_rule(key: str, rules: Mapping[str, Any]) -> str | None:
    """The longest key of `rules` that is `key` or above it."""
    names = re.split(r"\.|\[", key)
    above = (".".join(names[:length]) for length in range(len(names), 0, -1))
    return next((name for name in above if name in rules), None)


class Selecting:
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
