"""Find the fastest of several choices of settings in a given time, on a machine that does other things too."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from kd_pipeline._core.progress import Report, no_report
from kd_pipeline.bench.measure import rotated
from kd_pipeline.bench.tune_steps import Trial
from kd_pipeline.errors import KDPipelineError

__all__ = ["MIN_GAIN", "Gain", "Meter", "Race", "race"]

MIN_GAIN = 0.02
"""A choice that gains less is no reason to change a setting."""
_MAX_ROUNDS = 9
_MIN_ROUNDS = 3
"""Fewer decide only where time is up, or the difference is plain."""
_PLAIN_LOSS = 0.7
"""A choice with less of the present rate is out after one round."""
_PLAIN_GAIN = 1.2
"""A choice that gained so much in each of two rounds or more is faster, however far the rounds are apart."""
_TRIAL_S = (0.25, 2.0)
"""Shortest and longest time of one measurement."""


class Meter(Protocol):
    """What measures a choice of settings; see `RunSteps.rate`."""

    def rate(self, trial: Trial, *, seconds: float) -> float:
        """Images per second in steps that take about so many seconds together."""


@dataclass(frozen=True, slots=True)
class Gain:
    """How many times as fast as another one a choice of settings is."""

    ratio: float
    """The median of the ratios within each round, in which both are measured one after the other."""
    error: float
    """The standard error of that median, estimated from how far the ratios are apart; infinite for a single one."""
    lowest: float
    """The smallest of the ratios."""
    num_rounds: int

    @classmethod
    def of(cls, own: Sequence[float], others: Sequence[float]) -> "Gain":
        """From the rates of both in the same rounds."""
        ratios = [mine / its for mine, its in zip(own, others, strict=True)]
        middle = median(ratios)
        if len(ratios) == 1:
            return cls(middle, math.inf, middle, 1)
        # Of a normal distribution: 1.4826 MAD is its standard deviation, and 1.2533 the loss of the median over the
        # mean. With few ratios the MAD is often too small by chance, so the range is looked at as well.
        deviation = max(1.4826 * median(abs(ratio - middle) for ratio in ratios), (max(ratios) - min(ratios)) / 4)
        return cls(middle, 1.2533 * deviation / math.sqrt(len(ratios)), min(ratios), len(ratios))

    @property
    def is_certain(self) -> bool:
        """Whether it is faster by more than `MIN_GAIN`, and no accident."""
        if self.num_rounds > 1 and self.lowest >= _PLAIN_GAIN:
            return True
        return self.ratio >= 1 + MIN_GAIN and self.ratio - 2 * self.error > 1

    @property
    def is_possible(self) -> bool:
        """Whether more rounds could show that it is faster."""
        return self.ratio + 2 * self.error >= 1 + MIN_GAIN if math.isfinite(self.error) else self.ratio > _PLAIN_LOSS


@dataclass(frozen=True, slots=True)
class Race:
    """What was measured of some trials in the same rounds."""

    rates: dict[Trial, list[float]]
    """Images per second in each round; fewer for those that dropped out. The present settings come first."""
    failed: dict[Trial, str]
    """Why others cannot be measured."""

    @property
    def present(self) -> Trial:
        """The trial that the others are compared with."""
        return next(iter(self.rates))

    def gain(self, trial: Trial) -> Gain:
        """Of one trial over the present settings."""
        return self.over(trial, self.present)

    def over(self, trial: Trial, other: Trial) -> Gain:
        """Of one trial over another one, in the rounds in which both were measured."""
        own, others = self.rates[trial], self.rates[other]
        num_rounds = min(len(own), len(others))
        return Gain.of(own[:num_rounds], others[:num_rounds])

    @property
    def best(self) -> Trial:
        """The fastest trial of those that certainly gain something, else the present settings."""
        better = [trial for trial in self.rates if trial != self.present and self.gain(trial).is_certain]
        return max(better, key=lambda trial: self.gain(trial).ratio, default=self.present)


def race(
    meter: Meter,
    present: Trial,
    others: Iterable[Trial],
    *,
    until_s: float,
    drop: bool = True,
    max_rounds: int = _MAX_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    report: Report = no_report,
) -> Race:
    """Measure all trials in rounds, in an order that rotates, until the differences are clear or time is up.

    Args:
        meter: measures a trial.
        present: what the others are compared with.
        others: the others.
        until_s: when to stop, by `clock`; the first round is always finished by those that work.
        drop: leave out trials that cannot win any more, and stop as soon as all others are certain.
        max_rounds: how many rounds are enough.
        clock: tells the time.
        report: called after each measurement with the seconds that have passed and those that there are.
    """
    found, begun_s = Race({present: []}, {}), clock()
    num_seconds = max(math.ceil(until_s - begun_s), 1)
    running = [present, *(other for other in others if other != present)]
    share_s = (until_s - clock()) / (len(running) * (_MIN_ROUNDS + 2)) / 2  # half is for getting there
    seconds = min(max(share_s, _TRIAL_S[0]), _TRIAL_S[1])
    for number in range(max_rounds):
        started_s = clock()
        measured: dict[Trial, float] = {}
        # The present settings are measured first in the first round: what fails there fails in a training too.
        for trial in rotated(running, number):
            if number == 0 and trial != present and clock() > until_s:
                found.failed[trial] = "there was no time left to try it"
                continue
            try:
                measured[trial] = meter.rate(trial, seconds=seconds)
            except (KDPipelineError, RuntimeError, ValueError) as exc:
                if trial == present:
                    raise
                found.failed[trial] = str(exc)
            report(min(int(clock() - begun_s), num_seconds), num_seconds)
        for trial, rate in measured.items():
            found.rates.setdefault(trial, []).append(rate)
        running = [trial for trial in running if trial in measured]
        if drop:
            running = [trial for trial in running if trial == present or found.gain(trial).is_possible]
            gains = [found.gain(trial) for trial in running if trial != present]
            enough = 2 if len(gains) == 1 else _MIN_ROUNDS  # of several, the best one is wanted
            if not gains or (number + 1 >= enough and all(gain.is_certain for gain in gains)):
                break
        # The first round also opens everything, and says little about the next one.
        next_s = 0.0 if number == 0 else (clock() - started_s) * len(running) / max(len(measured), 1)
        if clock() + next_s > until_s:
            break
    return found
