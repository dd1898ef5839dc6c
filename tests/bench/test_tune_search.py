"""The fastest settings are found in noise, in time, and without settings that do not work."""

import math
import random

import pytest

from kd_pipeline.bench.tune_search import Gain, race
from kd_pipeline.bench.tune_steps import Trial
from kd_pipeline.errors import ConfigError

PRESENT = Trial()


def trial(threads: int) -> Trial:
    return Trial((("train.num_threads", threads),))


class FakeMeter:
    """Rates by trial, with noise, on a clock of its own."""

    def __init__(self, rates: dict[Trial, float], *, noise: float = 0.0, drift: float = 0.0, seed: int = 0) -> None:
        self.rates, self.noise, self.drift, self.now_s = rates, noise, drift, 0.0
        self.calls: list[Trial] = []
        self._random = random.Random(seed)

    def rate(self, trial: Trial, *, seconds: float) -> float:
        self.now_s += 2 * seconds
        self.calls.append(trial)
        if trial not in self.rates:
            raise ConfigError(f"no {trial.values}")
        load = 1 + self.drift * math.sin(self.now_s / 7)  # of others on the machine
        return self.rates[trial] * load * self._random.lognormvariate(0, self.noise)

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize("seed", range(10))
def test_fastest_is_found_in_noise(seed: int) -> None:
    rates = {PRESENT: 100.0, trial(1): 125.0, trial(3): 113.0, trial(4): 60.0}
    meter = FakeMeter(rates, noise=0.03, drift=0.3, seed=seed)
    found = race(meter, PRESENT, rates, until_s=120, clock=meter.clock)
    assert found.best == trial(1)
    assert len(found.rates[trial(4)]) == 1 < len(found.rates[trial(1)])


@pytest.mark.parametrize("seed", range(10))
def test_noise_changes_nothing(seed: int) -> None:
    rates = {PRESENT: 100.0, trial(1): 100.5, trial(3): 99.0}
    meter = FakeMeter(rates, noise=0.01, seed=seed)
    assert race(meter, PRESENT, rates, until_s=60, clock=meter.clock).best == PRESENT


def test_present_settings_win_where_time_is_up() -> None:
    meter = FakeMeter({PRESENT: 100.0, trial(1): 150.0})
    found = race(meter, PRESENT, [trial(1)], until_s=0, clock=meter.clock)
    assert found.best == PRESENT and "no time left" in found.failed[trial(1)]


def test_time_is_kept_but_for_a_round() -> None:
    rates = {trial(number): 100.0 + number for number in range(5)}
    meter = FakeMeter(rates | {PRESENT: 100.0}, noise=0.3)
    race(meter, PRESENT, rates, until_s=20, drop=False, clock=meter.clock)
    assert 10 < meter.now_s <= 20


def test_what_does_not_work_is_left_out() -> None:
    meter = FakeMeter({PRESENT: 100.0, trial(1): 150.0})
    found = race(meter, PRESENT, [trial(1), trial(2)], until_s=60, clock=meter.clock)
    assert found.best == trial(1) and "no " in found.failed[trial(2)]
    assert meter.calls.count(trial(2)) == 1


def test_broken_present_settings_are_an_error() -> None:
    meter = FakeMeter({trial(1): 150.0})
    with pytest.raises(ConfigError):
        race(meter, PRESENT, [trial(1)], until_s=60, clock=meter.clock)


@pytest.mark.parametrize(
    ("own", "others", "is_certain", "is_possible"),
    [
        ([150.0], [100.0], False, True),
        ([60.0], [100.0], False, False),
        ([130.0, 900.0], [100.0, 100.0], True, True),
        ([105.0, 106.0, 105.0], [100.0, 101.0, 100.0], True, True),
        ([101.0, 101.0, 101.0], [100.0, 100.0, 100.0], False, False),
        ([90.0, 130.0, 105.0], [100.0, 100.0, 100.0], False, True),
    ],
)
def test_gain(own: list[float], others: list[float], is_certain: bool, is_possible: bool) -> None:
    gain = Gain.of(own, others)
    assert (gain.is_certain, gain.is_possible) == (is_certain, is_possible)
