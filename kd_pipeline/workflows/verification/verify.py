"""Verify a finished run: that its student came from its config and its data, or which fact differs."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.terminal_log import log_line, log_to_terminal
from kd_pipeline._core.text import counted, printable
from kd_pipeline.config.config import Config, load_config
from kd_pipeline.config.reader import read_config
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.evidence import StartLine, describe_machine, read_evidence
from kd_pipeline.training.rng import RngState
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.workflows.resume import SavedRun
from kd_pipeline.workflows.verification.facts import Fact, Facts, Tolerance, reading
from kd_pipeline.workflows.verification.files import RunFiles, check_files
from kd_pipeline.workflows.verification.replay import check_results
from kd_pipeline.workflows.verification.replay_run import ReplayRun, quiet
from kd_pipeline.workflows.verification.replays import Replays, config_here, names_of_replays
from kd_pipeline.workflows.verification.stream import (
    check_batches,
    check_data,
    check_evidence_is_whole,
    check_stream,
    check_teacher,
)

__all__ = ["Fact", "VerifyReport", "VerifySettings", "runs_in", "verify"]

_CONFIG = "config.yaml"
_TOLERANCES = {"32-true": 1e-3}
_TOLERANCE_OF_HALF = 5e-2
_OF_DATA = ("training data", "validation data")
_OF_BATCHES = ("stream", "teacher", "images", "labels", "teacher outputs")
_OF_RESULTS = ("ONNX file", "result.json")


class VerifySettings(Settings):
    """How much of a run to do again."""

    steps: int = Field(default=16, ge=1)
    """Optimizer steps to train again from the seed, and from the best checkpoint if that is not of the end."""
    full: bool = False
    """Train all steps again, from the seed to the end; takes as long as the run."""
    batches: int = Field(default=8, ge=1)
    """Recorded batches to render again, and to run the teacher on, drawn at random."""
    replay: bool = True
    """Train steps again."""
    results: bool = True
    """Evaluate the exported student again, and run its ONNX file."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What is known about a run."""

    folder: Path
    facts: tuple[Fact, ...]
    rounding: str
    """Why the last bits may differ here from those of the run; empty if they may not."""
    num_steps: int
    """Optimizer steps of the run."""
    num_replayed: int
    """How many of them were trained again, and came out as recorded."""

    @property
    def differs(self) -> tuple[Fact, ...]:
        """The facts that differ."""
        return tuple(fact for fact in self.facts if fact.state == "differs")

    @property
    def holds(self) -> bool:
        """Whether no fact differs."""
        return not self.differs

    @property
    def verdict(self) -> str:
        """One sentence about the run."""
        if self.differs:
            return f"differs: {', '.join(dict.fromkeys(fact.name for fact in self.differs))}"
        if not self.num_replayed:
            return "nothing differs, but no step was trained again: what was checked fits together"
        if self.num_replayed == self.num_steps:
            extent = "its only step was" if self.num_steps == 1 else f"all {self.num_steps} steps were"
        else:
            extent = f"{self.num_replayed} of {self.num_steps} steps {'was' if self.num_replayed == 1 else 'were'}"
        how = "all that was done again is the same bit for bit"
        if not all(fact.is_exact for fact in self.facts if fact.state == "holds"):
            how = f"what was done again is the same within rounding{f' ({self.rounding})' if self.rounding else ''}"
        return f"this student came from this config and this data: {extent} trained again, and {how}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        steps = {"num_steps": self.num_steps, "num_replayed": self.num_replayed}
        facts = [asdict(fact) for fact in self.facts]
        return {"folder": str(self.folder), "holds": self.holds, "verdict": self.verdict, **steps, "facts": facts}


def runs_in(path: str | PathLike[str]) -> list[Path]:
    """The folder of a run, or those of the several students in it.

    Raises:
        ConfigError: there is none.
    """
    folder = argument_path(path)
    if (folder / _CONFIG).is_file():
        return [folder]
    found = [each.parent for each in sorted(folder.glob(f"*/{_CONFIG}"))]
    if not found:
        raise ConfigError(f"{folder} is not the folder of a run: it has no {_CONFIG}")
    return found


@log_to_terminal()
def verify(
    run: str | PathLike[str],
    settings: VerifySettings | None = None,
    *,
    overrides: Sequence[str] = (),
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    report: Callable[[str], object] = log_line,
) -> VerifyReport:
    """Compare a run with what it recorded while it trained, and do parts of it again. The run folder is only read.

    It looks at config, checkpoints, data, teacher and results, renders batches again, trains the first steps from the
    seed again, those after the best checkpoint too, and evaluates the exported student again. What cannot be checked
    says why.

    Args:
        run: the folder of a stage of a run, or of one of several students.
        settings: how much to do again.
        overrides: where data and teacher are now, as settings of the config, each `key.path=value`.
        plugins: modules that factories and losses in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        report: called with lines of progress; without it they are logged.

    Raises:
        ConfigError: this is no run folder, or one with several students, each of which has its own.
    """
    folders = runs_in(run)
    if folders != [argument_path(run)]:
        raise ConfigError(f"{run} has the runs of several students; verify one: {' or '.join(map(str, folders))}")
    settings = settings or VerifySettings()
    facts = Facts()
    files = _read_files(folders[0], facts)
    report(f"comparing the files of {files.folder.path}")
    check_files(files, facts)
    verification = _Verification(files, facts, settings, overrides, plugins, trust_engines, report)
    with _restored(), quiet(), tempfile.TemporaryDirectory(prefix="kd_pipeline_verify_") as scratch:
        verification.run(Path(scratch))
    return VerifyReport(
        files.folder.path,
        _one_of_each(facts.found),
        verification.tolerance.why,
        num_steps=0 if files.last is None else files.last.step,
        num_replayed=len(verification.replayed),
    )


def _read_files(path: Path, facts: Facts) -> RunFiles:
    folder = RunFolder(path)
    evidence, saved = None, {}
    with facts.part("evidence"):
        evidence = read_evidence(folder.evidence)
    for name in ("last.ckpt", "best.ckpt"):
        if (folder.checkpoints / name).is_file():
            with facts.part("checkpoints"):
                saved[name] = SavedRun.load(folder.checkpoints / name)
    config = read_config(Config, path / _CONFIG)
    if config.stage == "all":
        raise ConfigError(f"{path / _CONFIG} is a config of two stages, and no stage has this folder")
    return RunFiles(folder, config, evidence, saved.get("last.ckpt"), saved.get("best.ckpt"))


def _one_of_each(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """Of two facts with a name, the one that differs."""
    found: dict[str, Fact] = {}
    for fact in facts:
        if fact.name not in found or fact.state == "differs":
            found[fact.name] = fact
    return tuple(found.values())


class _Verification:
    """What is opened and done again."""

    def __init__(
        self,
        files: RunFiles,
        facts: Facts,
        settings: VerifySettings,
        overrides: Sequence[str],
        plugins: Collection[str],
        trust_engines: Collection[str],
        report: Callable[[str], object],
    ) -> None:
        self._files, self._facts, self._settings, self._report = files, facts, settings, report
        self._permissions, self._overrides = {"plugins": plugins, "trust_engines": trust_engines}, overrides
        starts = [] if files.evidence is None else files.evidence.starts
        self.tolerance = _tolerance(config_here(files.config, files), starts)
        self.replayed: set[int] = set()
        """Steps, counted from 1, that were trained again and came out as recorded; not those after the last record."""

    def run(self, scratch: Path) -> None:
        """Add all facts for which something has to be opened."""
        files, facts, settings = self._files, self._facts, self._settings
        of_replays = names_of_replays(full=settings.full) if settings.replay else ()
        later = (*_OF_DATA, *_OF_BATCHES, *of_replays, *(_OF_RESULTS if settings.results else ()))
        if files.says.get("objects") or files.config.data.train is None:
            objects = ", ".join(map(str, files.says.get("objects") or ["train_batches"]))
            why = (
                f"the run was started in Python with objects ({printable(objects)[:200]}), which are not in its folder"
            )
            for name in later:
                facts.unknown(name, why)
            return
        with facts.part(*later), ExitStack() as stack:
            self._report("opening the data")
            config = config_here(load_config(files.folder.path / _CONFIG, self._overrides), files)
            replays = Replays(files, facts, config, self.tolerance, self._permissions, self._report)
            opened = stack.enter_context(replays.open(config, scratch / "opened"))
            differing = self._check_data_and_teacher(opened)
            if settings.replay:
                self.replayed = replays.run(opened, scratch, None if settings.full else settings.steps, differing)
            if settings.results:
                self._report("evaluating the exported student again")
                check_results(files, opened, facts, self.tolerance)

    def _check_data_and_teacher(self, opened: ReplayRun) -> list[str]:
        """Open them, and compare them and their batches; returns what differs."""
        files, facts, number = self._files, self._facts, self._settings.batches
        data = opened.open_data()
        with reading("what the run says about itself"):
            is_same = check_data(files, data, facts)
        loader = opened.open_loader()
        with reading("what the run says about itself"):
            is_same &= check_stream(files, opened, facts)
            is_same_teacher = check_teacher(files, opened, facts)
        check_evidence_is_whole(files, loader, facts)
        self._report(f"rendering {counted(number, 'batch')} again")
        with facts.part("images", "labels", "teacher outputs"):
            check_batches(files, opened, facts, self.tolerance, num_batches=number, is_same_teacher=is_same_teacher)
        return [name for name, same in (("data", is_same), ("teacher", is_same_teacher)) if not same]


def _tolerance(config: Config, starts: Sequence[StartLine]) -> Tolerance:
    """How close numbers are here to those of the machine that the run was on."""
    relative = _TOLERANCES.get(config.train.precision, _TOLERANCE_OF_HALF)
    if not starts:
        return Tolerance(False, "the machine of the run is not known", relative)
    device = resolve_device(config.data.device)
    here = describe_machine(device) | {"threads": config.train.num_threads}
    reasons = [
        f"{name} {printable(start.machine.get(name))[:80]} → {here.get(name)}"
        for start in starts
        for name in {**start.machine, **here}
        if start.machine.get(name) != here.get(name)
    ]
    if device.type == "cuda" and not config.train.deterministic:
        reasons.append("a GPU adds in any order without train.deterministic")
    return Tolerance(not reasons, ", ".join(dict.fromkeys(reasons)), relative)


@contextmanager
def _restored() -> Iterator[None]:
    """Leave torch's random state, threads and algorithms as they were."""
    rng, threads = RngState.capture(), torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)
        torch.set_num_threads(threads)
        rng.restore()
