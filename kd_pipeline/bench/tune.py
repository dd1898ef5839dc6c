"""Find the settings that make a run fastest on this machine and leave what is learned as it is."""

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from pydantic import Field, ValidationError

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline._core.progress import progress_bar
from kd_pipeline._core.ranks import world_size
from kd_pipeline._core.settings import Settings, require_config
from kd_pipeline.bench.measure import environment
from kd_pipeline.bench.tune_compile import compile_in_child
from kd_pipeline.bench.tune_knobs import KNOBS, Allowed, Choice, Knob, Place
from kd_pipeline.bench.tune_result import Option, TuneResult, as_overrides
from kd_pipeline.bench.tune_search import MIN_GAIN, Race, race
from kd_pipeline.bench.tune_steps import Part, RunSteps, Trial, Values
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.workflows.stage import Stage, check_config, require_one_student

__all__ = ["TuneSettings", "tune"]

_SPARE_S = 10.0
"""Of the time allowed: to start Python, and to close everything at the end."""
_FIRST_KNOB, _FIRST_LOOK, _LAST_LOOK = 0.35, 0.12, 0.25
"""Shares of the time: the most that the first knob may take, and those for the parts of a step before and after the
others."""
_TRACE_S = 20.0
"""How long it takes at most to load what was compiled in another process, and to measure it."""


class TuneSettings(Settings):
    """How long to search, and among what."""

    seconds: float = Field(default=180.0, gt=0)
    """How long it may take, at most."""
    allow: tuple[Allowed, ...] = ()
    """What to choose although it changes more than the speed."""
    out: Path | None = None
    """JSON file for everything that was measured."""


def tune(
    config: Config,
    settings: TuneSettings | None = None,
    *,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    report: Callable[[str], object] = lambda line: None,
) -> TuneResult:
    """Try settings of `config` in real steps of its run, and return those that are fastest on this machine.

    One setting after the other is compared with the best so far, in rounds in which all candidates take turns, so other
    load on the machine hits them alike. A teacher in another precision has to agree with float32 on images of the run.
    Nothing is written to the run's folder, and nothing is trained. `stage: all` is tuned as `distill`, and a config
    without a student, for a loop of your own, without one.

    Args:
        config: the whole run.
        settings: how long to search, and among what.
        plugins: modules that factories and losses in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        report: receives lines of progress.

    Raises:
        ConfigError: the config lacks something, or this is one of several processes.
        DataError, TeacherError: the data or the teacher does not match the config.
    """
    require_config(config)
    settings = settings or TuneSettings()
    started_s = time.perf_counter()
    if world_size() > 1:
        raise ConfigError("tune measures a single process; start it without torchrun, srun or mpirun")
    if settings.out is not None:
        prepare_output(settings.out)
    stage: Stage = "distill" if config.stage == "all" else config.stage
    if stage != "teacher":
        require_one_student(config, "tune")
    if stage != "distill" or config.student is not None:
        check_config(config, stage)
    report("opening the images, the teacher and the student")
    with ExitStack() as opened:
        with progress_bar("opening"):
            steps = opened.enter_context(RunSteps(config, stage, plugins=plugins, trust_engines=trust_engines))
        if steps.has_random_teacher:
            report("the teacher is not trained yet: it is measured with random weights, in the precision that is set")
        place = Place.of(config, stage, default_threads=steps.default_threads)

        def compile_student(values: Values, timeout_s: float) -> float:
            config = steps.settings(values)
            return compile_in_child(config, stage, plugins=plugins, trust_engines=trust_engines, timeout_s=timeout_s)

        search = _Search(steps, place, settings.allow, compile_student, report)
        result = search.run(started_s, settings.seconds - min(_SPARE_S, settings.seconds / 4))
    if settings.out is not None:
        write_output(settings.out, result.to_json() + "\n")
    return result


class _Search:
    """One setting after the other, each compared with the best so far."""

    def __init__(
        self,
        steps: RunSteps,
        place: Place,
        allow: Collection[Allowed],
        compile_student: Callable[[Values, float], float],
        report: Callable[[str], object],
    ) -> None:
        """`compile_student` compiles it under some settings in at most so many seconds, and returns those it took."""
        self._compile_student = compile_student
        self._steps, self._place, self._allow, self._report = steps, place, allow, report
        self._best: Values = ()
        self._compile_s = 0.0
        self._changed: list[str] = []
        """Names of the knobs that changed it."""
        self._races: dict[str, Race] = {}
        self._left_out: dict[str, str] = {}
        self._not_allowed: list[Choice] = []

    def run(self, started_s: float, seconds: float) -> TuneResult:
        """Search until so many seconds after `started_s`."""
        last_s = started_s + (1 - _LAST_LOOK) * seconds
        for knob in KNOBS[:1]:  # with threads that get into each other's way, nothing else can be measured well
            self._try(knob, knob.name, started_s + _FIRST_KNOB * seconds)
        first = self._look("parts of a step", self._best, time.perf_counter() + _FIRST_LOOK * seconds)
        knobs = [knob for knob in KNOBS[1:] if self._is_worth_it(knob, first)]
        for number, knob in enumerate(knobs):
            self._try(knob, knob.name, _share(last_s, len(knobs) - number))
        tried = [KNOBS[0], *knobs]
        again = tried[: max((tried.index(knob) for knob in tried if knob.name in self._changed), default=0)]
        again = [knob for knob in again if knob.name.endswith("num_threads")]
        for number, knob in enumerate(again):  # the best number of threads depends on what was changed after it
            self._try(knob, f"{knob.name} again", _share(last_s, len(again) - number))
        options = self._options(last_s)
        final = self._look("last comparison", (), started_s + seconds)
        return TuneResult(
            tried=self._best,
            final=final,
            races=self._races,
            options=options,
            left_out=self._left_out,
            seconds=time.perf_counter() - started_s,
            environment=environment(),
        )

    def _look(self, name: str, present: Values, until_s: float) -> Race:
        """Compare the `present` settings, the best so far, and the best so far without parts of a step."""
        parts: list[Part] = ["no loader"] if self._place.has_student or self._place.has_teacher else []
        if self._place.has_teacher and self._place.has_student:
            parts += ["no teacher", "student"]
        elif self._place.has_teacher:
            parts = ["no loader", "no teacher"]
        trials = [Trial(self._best), *(Trial(self._best, part) for part in parts)]
        return self._race(name, Trial(present), trials, until_s, drop=False)

    def _is_worth_it(self, knob: Knob, first: Race) -> bool:
        """Whether the part of a step that the knob speeds up takes any time."""
        part: Part | None = {"loader": "no loader", "teacher": "no teacher"}.get(knob.speeds)  # type: ignore[assignment]
        trial = None if part is None else Trial(self._best, part)
        if trial is None or trial not in first.rates:
            return True
        gain = first.over(trial, Trial(self._best))
        if gain.num_rounds == 1 or gain.is_possible:
            return True
        self._report(f"{knob.name}: left as it is, because the {knob.speeds} costs less than {MIN_GAIN:.0%} of a step")
        return False

    def _try(self, knob: Knob, name: str, until_s: float) -> None:
        """Compare what the knob offers with the best so far, which is replaced by something faster."""
        trials = []
        for choice in knob.choices(self._place):
            if choice.needs is not None and choice.needs not in self._allow:
                self._not_allowed += [] if choice in self._not_allowed else [choice]
            elif time.perf_counter() < until_s and self._works(choice, until_s):
                trials.append(Trial(merged(self._best, choice.values)))
        if not trials:
            return
        left_s = max(until_s - time.perf_counter(), 0)
        self._report(f"{name}: comparing {len(trials) + 1} settings, for at most {left_s:.0f} s")
        found = self._race(name, Trial(self._best), trials, until_s)
        self._races[name] = found
        self._left_out |= {as_overrides(trial.values): reason for trial, reason in found.failed.items()}
        best = found.best
        if best != found.present and self._pays_off(knob, found):
            self._best = best.values
            self._changed.append(name)
        self._steps.keep({(), self._best})

    def _pays_off(self, knob: Knob, found: Race) -> bool:
        """Whether the whole training saves more time than compiling the student takes, if this is about that."""
        if knob.name != "train.compile":
            return True
        before, after = (median(found.rates[trial]) for trial in (found.present, found.best))
        saved_s = self._steps.num_images * (1 / before - 1 / after)
        if saved_s > self._compile_s:
            return True
        self._left_out["train.compile=true"] = (
            f"it would save {saved_s:.0f} s of the whole training, and compiling takes {self._compile_s:.0f} s"
        )
        return False

    def _works(self, choice: Choice, until_s: float) -> bool:
        """Whether the choice differs from the best so far, its teacher agrees, and its student compiles."""
        values = merged(self._best, choice.values)
        try:
            if self._place.is_same(values, self._best):
                return False
            if any(key in ("teacher.precision", "teacher.backend") for key, _ in choice.values):
                self._check_teacher(values)
            if ("train.compile", True) in choice.values:
                self._report("compiling the student")
                with progress_bar("compiling the student"):
                    self._compile_s = self._compile_student(values, until_s - time.perf_counter() - _TRACE_S)
        except (KDPipelineError, RuntimeError, ValueError) as exc:
            reason = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else str(exc)
            self._left_out[as_overrides(choice.values)] = reason
            return False
        return True

    def _check_teacher(self, values: Values) -> None:
        present, wanted = self._steps.runtime(self._best), dict(values)
        if (wanted["teacher.backend"], wanted["teacher.precision"]) == (present.backend, present.precision):
            raise ConfigError("it is the present one")
        runtime = self._steps.runtime(values)
        if runtime.fingerprint == present.fingerprint:
            raise ConfigError("it is the present one")
        if runtime.precision == present.precision:
            return
        if self._steps.has_random_teacher:
            raise ConfigError("the teacher has no weights yet with which its precisions could be compared")
        self._steps.check_agreement(values)

    def _options(self, until_s: float) -> list[Option]:
        """Compare what the user would have to allow with the best so far."""
        choices = {
            Trial(merged(self._best, choice.values)): choice
            for choice in self._not_allowed
            if self._works(choice, until_s)
        }
        if not choices or time.perf_counter() > until_s:
            return []
        found = self._race("to be allowed", Trial(self._best), choices, until_s)
        self._races["to be allowed"] = found
        self._left_out |= {as_overrides(trial.values): reason for trial, reason in found.failed.items()}
        self._steps.keep({(), self._best})
        return [
            Option(choices[trial].values, needs, found.gain(trial))
            for trial in found.rates
            if trial in choices and (needs := choices[trial].needs) is not None
        ]

    def _race(self, name: str, present: Trial, others: Iterable[Trial], until_s: float, *, drop: bool = True) -> Race:
        """Compare `others` with the present settings, and report how fast each was."""
        with progress_bar(f"{name}, seconds") as report_seconds:
            found = race(self._steps, present, others, until_s=until_s, drop=drop, report=report_seconds)
        rows = []
        for trial, rates in found.rates.items():
            values = tuple(pair for pair in trial.values if pair not in found.present.values)
            part = "" if trial.part == "all" else trial.part
            label = ", ".join(filter(None, [as_overrides(values), part])) or "as it is"
            rows.append(f"{label} {median(rates):,.1f}")
        self._report(f"{name}, images/s: {'; '.join(rows)}")
        return found


def merged(values: Values, more: Values) -> Values:
    """`values` with `more` in place of those with the same keys."""
    return tuple(sorted((dict(values) | dict(more)).items()))


def _share(until_s: float, num_left: int) -> float:
    """The end of the time for one of several that share what is left; later ones often need less than theirs."""
    now_s = time.perf_counter()
    return min(until_s, now_s + 1.5 * (until_s - now_s) / num_left)
