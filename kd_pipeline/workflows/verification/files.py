"""What the files of a finished run say about each other, without opening its data or training again."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_pipeline._core.files import open_regular
from kd_pipeline._core.text import counted, printable
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, StateError
from kd_pipeline.models.checkpoints import read_checkpoint
from kd_pipeline.training.checkpoint import load_checkpoint
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.evidence import Evidence, describe_weights
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.exported import WEIGHTS, read_exported
from kd_pipeline.workflows.resume import SavedRun
from kd_pipeline.workflows.setting_changes import changed_settings
from kd_pipeline.workflows.verification.facts import Facts, reading

__all__ = ["RunFiles", "check_files", "read_weights"]

_SAME_FOR_ALL = ("run_dir",)
"""Settings that a moved folder changes."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run folder that is verified."""

    folder: RunFolder
    """Of the stage."""
    config: Config
    """`config.yaml`, as it is."""
    evidence: Evidence | None
    last: SavedRun | None
    """The last checkpoint; None without one."""
    best: SavedRun | None
    """The best one."""

    @property
    def best_file(self) -> Path:
        """The best checkpoint."""
        return self.folder.checkpoints / "best.ckpt"

    @property
    def says(self) -> Mapping[str, Any]:
        """What the run says about itself: in its last checkpoint, or in its evidence."""
        if self.last is not None:
            return self.last.run
        return self.evidence.starts[-1].identity if self.evidence is not None and self.evidence.starts else {}

    @property
    def num_processes(self) -> int:
        """That trained together, as far as that is known."""
        starts = [] if self.evidence is None else self.evidence.starts
        return max((start.processes for start in starts), default=1)


def check_files(files: RunFiles, facts: Facts) -> None:
    """Add what the files say about each other."""
    with facts.part("config"), reading("the config in a checkpoint"):
        _check_config(files, facts)
    with facts.part("evidence"), reading("evidence.jsonl"):
        _check_evidence(files, facts)
    with facts.part("checkpoints"), reading("a checkpoint"):
        _check_checkpoints(files, facts)
    with facts.part("exported student"), reading("the exported student, or the best checkpoint,"):
        _check_exported(files, facts)
    with facts.part("result files"), reading("history.jsonl"):
        _check_results(files, facts)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file by name.

    Raises:
        ConfigError: it does not hold weights.
    """
    found = read_checkpoint(path)
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ConfigError(f"{path} does not hold weights by name")
    return {str(name): each for name, each in found.items()}


def _check_config(files: RunFiles, facts: Facts) -> None:
    """`config.yaml` against what checkpoints and evidence say that the run was trained with."""
    ours = shown_settings(files.config)
    compared: dict[str, Mapping[str, Any]] = {}
    if files.last is not None:
        compared["last.ckpt"] = files.last.run.get("config", {})
    if files.evidence is not None and files.evidence.starts:
        compared["evidence.jsonl"] = files.evidence.starts[-1].config
    if not compared:
        facts.unknown("config", "there is neither a checkpoint nor evidence to compare config.yaml with")
        return
    lines: dict[str, list[str]] = {}
    for name, theirs in compared.items():
        for change in changed_settings(theirs, ours):
            if change.key not in _SAME_FOR_ALL:
                lines.setdefault(str(change), []).append(name)
    if lines:
        sources = " and ".join(dict.fromkeys(name for names in lines.values() for name in names))
        facts.differs("config", lines, cause=f"The old values are those in {sources}, the new ones in config.yaml")
        return
    facts.holds("config", f"config.yaml is what {' and '.join(compared)} say")


def _check_evidence(files: RunFiles, facts: Facts) -> None:
    evidence = files.evidence
    if evidence is None:
        facts.unknown(
            "evidence",
            "there is no evidence.jsonl: the run was trained by a release that did not write one, or it was deleted",
        )
        return
    wrong = []
    if evidence.damaged:
        wrong.append(f"lines that are none: {', '.join(map(str, evidence.damaged[:5]))}")
    if not evidence.starts or evidence.starts[0].step != 0:
        wrong.append("it does not begin at step 0")
    if wrong:
        facts.differs("evidence", wrong, cause="A crash leaves one such line at most" if evidence.damaged else "")
        return
    resumed = f", {len(evidence.starts)} starts" if len(evidence.starts) > 1 else ""
    batches, steps = counted(len(evidence.batches), "batch"), counted(len(evidence.weights), "step")
    facts.holds("evidence", f"{batches}, weights after {steps}{resumed}")


def _check_checkpoints(files: RunFiles, facts: Facts) -> None:
    """The weights in the checkpoints against those that the evidence says."""
    if files.last is None:
        facts.unknown("checkpoints", "there is no checkpoints/last.ckpt")
        return
    if files.evidence is None:
        facts.unknown("checkpoints", "there is no evidence to compare them with")
        return
    wrong, equal, skipped = [], [], []
    for name, saved in (("last.ckpt", files.last), ("best.ckpt", files.best)):
        if saved is None:
            continue
        recorded = files.evidence.weights.get(saved.step)
        if recorded is None:
            skipped.append(f"of step {saved.step} ({name}) there is no digest")
            continue
        found = describe_weights(_parts(load_checkpoint(files.folder.checkpoints / name)), epoch=0, step=saved.step)
        for part, old in recorded.weights.items():
            new = found.weights.get(part)
            if new is None or new.digest != old.digest:
                after = "none" if new is None else new.digest[:8]
                wrong.append(f"{part} in {name}, step {saved.step}: {old.digest[:8]} → {after}")
        equal.append(f"{name} (step {saved.step})")
    if wrong:
        facts.differs("checkpoints", wrong, cause="The file, or evidence.jsonl, is not that of this training")
    elif equal:
        facts.holds("checkpoints", f"weights of {' and '.join(equal)} are those of the evidence")
    else:
        facts.unknown("checkpoints", "; ".join(skipped))


def _parts(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The weights in a checkpoint, in the parts of the evidence."""
    state = checkpoint["state_dict"]
    is_wrapped = any(name.startswith("student.student.") for name in state)
    prefixes = {"student": "student.student." if is_wrapped else "student.", "loss": "distillation."}
    found = {
        part: {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    if isinstance(ema := checkpoint.get("ema"), Mapping) and isinstance(ema.get("student"), Mapping):
        found["ema"] = dict(ema["student"])
    for part, tensors in found.items():
        if bad := [name for name, each in tensors.items() if not isinstance(each, Tensor)]:
            raise StateError(f"the checkpoint does not hold weights: {part} {printable(bad[0])[:100]} is no tensor")
    return found


def _check_exported(files: RunFiles, facts: Facts) -> None:
    """The exported weights against those of the best student, or of the last one if none was selected."""
    if not (files.folder.exported / WEIGHTS).exists():
        facts.unknown("exported student", "the run has exported none yet: it is not finished")
        return
    exported = read_exported(files.folder.path)
    assert exported is not None
    digest = _sha256(files.folder.exported / WEIGHTS)
    if digest != exported[1].weights_sha256:
        facts.differs("exported student", [f"{WEIGHTS}: sha256 {exported[1].weights_sha256[:8]} → {digest[:8]}"])
        return
    weights = read_weights(files.folder.exported / WEIGHTS)
    wrong, sources = [], []
    for name, selected in _selected(files):
        sources.append(name)
        prefix = next(_prefixes(weights, selected), None)
        if prefix is None:
            wrong.append(f"{WEIGHTS} and {name} have tensors of other names")
        elif changed := [each for each in weights if not _same(weights[each], selected[prefix + each])]:
            count = f"{len(changed)} of {len(weights)} tensors"
            wrong.append(f"{count} of {WEIGHTS} are not those of {name}, such as {printable(changed[0])[:100]}")
    if wrong:
        facts.differs("exported student", wrong, cause="The exported file is that of a different run or step")
    else:
        facts.holds("exported student", f"the {len(weights)} tensors of {WEIGHTS} are those of {' and '.join(sources)}")


def _selected(files: RunFiles) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The weights that a run exports, by the names of the files that have them."""
    name = "last.ckpt"
    best = files.folder.checkpoints / "best_student.pt"
    if best.is_file() and files.best is not None:
        name = "best.ckpt"
        yield best.name, read_weights(best)
    parts = _parts(load_checkpoint(files.folder.checkpoints / name))
    yield name, parts.get("ema", parts["student"])


def _prefixes(weights: Mapping[str, Any], selected: Mapping[str, Any]) -> Iterator[str]:
    """What the names of exported weights have before them in the student's, which may have a part around it."""
    first = next(iter(weights), "")
    for name in selected:
        prefix = name.removesuffix(first)
        if name.endswith(first) and all(prefix + each in selected for each in weights):
            yield prefix


def _same(exported: Tensor, student: Tensor) -> bool:
    """Whether a tensor is the student's, which is exported in float32."""
    student = student.float() if student.is_floating_point() else student
    return exported.shape == student.shape and torch.equal(exported, student.to(exported.dtype))


def _check_results(files: RunFiles, facts: Facts) -> None:
    """The digests of the files of the result that the history has."""
    recorded = [event for event in files.folder.events() if event.get("event") == "results"]
    if not recorded:
        facts.unknown("result files", "history.jsonl does not say that the run has results")
        return
    digests = recorded[-1].get("files")
    if not isinstance(digests, Mapping) or len(digests) > 1000:
        facts.differs("result files", ["history.jsonl is damaged"])
        return
    changed = []
    for name, old in digests.items():
        path = files.folder.path / str(name)
        if not path.resolve().is_relative_to(files.folder.path.resolve()):
            changed.append(f"{printable(name)[:100]} is not in the folder")
            continue
        new = _sha256(path) if path.exists() else "none"
        if new != old:
            changed.append(f"{printable(name)[:100]}: sha256 {printable(old)[:8]} → {new[:8]}")
    if changed:
        facts.differs("result files", changed, cause="They were changed after the run")
    else:
        facts.holds("result files", f"{', '.join(map(str, digests))} as the run has left them")


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise StateError(f"{path} cannot be read: {exc.strerror}") from None
