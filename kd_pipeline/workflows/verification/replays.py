"""Train steps of a finished run again: the first, those after its best checkpoint, or all of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_pipeline.config.config import Config
from kd_pipeline.errors import StateError
from kd_pipeline.training.evidence import Evidence, StartLine
from kd_pipeline.workflows.setting_changes import changed_settings
from kd_pipeline.workflows.verification.facts import Facts, Tolerance
from kd_pipeline.workflows.verification.files import RunFiles
from kd_pipeline.workflows.verification.replay import compare_replay
from kd_pipeline.workflows.verification.replay_run import ReplayRun

__all__ = ["Replays", "config_here", "names_of_replays"]

_ALL, _FIRST, _LAST = "all steps", "first steps", "last steps"
_MAX_THREADS = 1024


def names_of_replays(*, full: bool) -> tuple[str, ...]:
    """The names of the facts, of all steps or of some."""
    return (_ALL,) if full else (_FIRST, _LAST)


def config_here(config: Config, files: RunFiles, start: StartLine | None = None) -> Config:
    """`config` in the folder where the run is now, with as many threads as it had.

    Args:
        config: of the run.
        files: of the run.
        start: whose threads to take; defaults to the last one.
    """
    if start is None and files.evidence is not None and files.evidence.starts:
        start = files.evidence.starts[-1]
    changes: dict[str, Any] = {"run_dir": files.folder.path}
    threads = None if start is None else start.machine.get("threads")
    if config.train.num_threads is None and isinstance(threads, int) and 0 < threads <= _MAX_THREADS:
        changes["train"] = config.train.model_copy(update={"num_threads": threads})
    return config.model_copy(update=changes)


class Replays:
    """Trains steps again in folders of their own, and adds how they compare with the evidence of the run."""

    def __init__(
        self,
        files: RunFiles,
        facts: Facts,
        config: Config,
        tolerance: Tolerance,
        permissions: Mapping[str, Collection[str]],
        report: Callable[[str], object],
    ) -> None:
        """Prepare to train.

        Args:
            files: of the run.
            facts: get what is found out.
            config: of the run, as it is opened here.
            tolerance: how close numbers have to be.
            permissions: the arguments `plugins` and `trust_engines` of a `ReplayRun`.
            report: called with lines of progress.
        """
        self._files, self._facts, self._config, self._tolerance = files, facts, config, tolerance
        self._permissions, self._report = permissions, report
        self._replayed: set[int] = set()

    def open(self, config: Config, scratch: Path, *, stop_after: int = 0) -> ReplayRun:
        """The run with a config, in an empty folder; it trains up to the step `stop_after`."""
        return ReplayRun(
            config,
            self._files.folder.path,
            scratch,
            begun_with=self._files.says,
            num_processes=self._files.num_processes,
            stop_after=stop_after,
            **self._permissions,
        )

    def run(self, opened: ReplayRun, scratch: Path, count: int | None, differing: Sequence[str]) -> set[int]:
        """Train, and compare.

        Args:
            opened: the run with its data and teacher.
            scratch: an empty folder.
            count: steps to train, each time; None trains all.
            differing: what is not as it was, so the steps cannot be.

        Returns:
            The steps, counted from 1, that came out as recorded.
        """
        last, best, names = self._files.last, self._files.best, names_of_replays(full=count is None)
        why = self._obstacle(differing)
        if why is not None or last is None:
            for name in names:
                self._facts.unknown(name, why or "")
        elif count is None:
            self._replay_all(opened, scratch, last.step)
        else:
            self._replay_from(_FIRST, opened, scratch / "first", 0, self._end(0, count, last.step))
            if best is not None and 0 < best.step < last.step:
                end = self._end(best.step, count, last.step)
                self._replay_from(_LAST, opened, scratch / "last", best.step, end, self._files.best_file)
            else:
                at_end = "" if best is None else ", as the best one is that of the end"
                why = f"no checkpoint before the end (step {last.step}) is kept{at_end}; --full trains all steps again"
                self._facts.unknown(_LAST, why)
        return self._replayed

    def _obstacle(self, differing: Sequence[str]) -> str | None:
        """Why no step can be trained again; None if some can."""
        evidence = self._files.evidence
        if self._files.num_processes > 1:
            return f"{self._files.num_processes} processes trained together, and a replay is one process"
        if evidence is None or not evidence.starts:
            return "there is no evidence to compare it with"
        if self._files.last is None:
            return "there is no last checkpoint"
        if differing:
            return f"the {' and the '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}"
        return None

    @property
    def _evidence(self) -> Evidence:
        assert self._files.evidence is not None  # or there is an obstacle
        return self._files.evidence

    def _replay_all(self, opened: ReplayRun, scratch: Path, last: int) -> None:
        """Train from the seed to the end; where the run was resumed with other settings, with these from there on."""
        replayed, step, checkpoint = Evidence(), 0, None
        with self._facts.part(_ALL):
            while step < last:
                end = self._end(step, last, last)
                if end <= step:
                    raise StateError("the evidence has starts that are no order of steps")
                found, checkpoint = self._trained(opened, scratch / f"from_{step}", step, end, checkpoint)
                replayed.batches.update(found.batches)
                replayed.weights.update(found.weights)
                step = end
            self._compare(_ALL, replayed, first=0)

    def _replay_from(
        self, name: str, opened: ReplayRun, scratch: Path, first: int, end: int, checkpoint: Path | None = None
    ) -> None:
        """Train steps again after the first ones, and compare them."""
        with self._facts.part(name):
            replayed, _ = self._trained(opened, scratch, first, end, checkpoint)
            self._compare(name, replayed, first=first)

    def _compare(self, name: str, replayed: Evidence, *, first: int) -> None:
        same = compare_replay(name, self._evidence, replayed, self._facts, self._tolerance, first_step=first)
        self._replayed |= {*range(first + 1, same + 1)}

    def _trained(
        self, opened: ReplayRun, scratch: Path, first: int, end: int, checkpoint: Path | None
    ) -> tuple[Evidence, Path]:
        """The evidence of steps that are trained again, and the checkpoint after them."""
        steps = f"step {end}" if end == first + 1 else f"steps {first + 1} to {end}"
        self._report(f"training {steps} again")
        with self.open(self._config_after(first), scratch, stop_after=end) as run:
            run.share(opened)
            return run.replay(checkpoint), run.ended_with

    def _end(self, first: int, count: int, last: int) -> int:
        """The last of so many steps after the first ones that the run has taken with the same settings."""
        starts = self._evidence.starts
        changed = [each.step for each in starts if each.step > first and _is_other(each, self._start(first))]
        return min(first + count, last, *changed)

    def _start(self, step: int) -> StartLine:
        """The start of the run, the last one that took the step after this one."""
        starts = self._evidence.starts
        return next((each for each in reversed(starts) if each.step <= step), starts[0])

    def _config_after(self, step: int) -> Config:
        """The config that the step after this one was taken with: that of the run, unless it was changed later."""
        start = self._start(step)
        if not _is_other(start, self._evidence.starts[-1]):
            return self._config
        try:
            config = Config.model_validate(start.config)
        except ValueError:
            raise StateError(f"the evidence of step {start.step} does not hold a config") from None
        now = self._config
        changes = {"data": now.data, "teacher": now.teacher}
        return config_here(config.model_copy(update=changes), self._files, start)


def _is_other(one: StartLine, other: StartLine) -> bool:
    """Whether two starts of a run had different settings."""
    return bool(changed_settings(one.config, other.config))
