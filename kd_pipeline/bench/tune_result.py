"""What `tune` has found: a table for people, and everything for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from kd_pipeline.bench.measure import format_table, spread
from kd_pipeline.bench.tune_knobs import ALLOWABLE, Allowed
from kd_pipeline.bench.tune_search import MIN_GAIN, Gain, Race
from kd_pipeline.bench.tune_steps import Part, Trial, Values

__all__ = ["Option", "TuneResult", "as_overrides"]

_ROWS = {
    "no loader": "and an ideal loader",
    "no teacher": "and a free teacher",
    "student": "and both: the student alone",
}
"""What the rows after the chosen settings are called, by what is left out of a step."""
_KEPT_BY_A_RUN = ("teacher.backend", "teacher.precision", "train.precision", "data.decode", "data.hw_decoder_load")
"""What a run cannot resume with other values of, because pixels, outputs or arithmetic depend on it."""


@dataclass(frozen=True, slots=True)
class Option:
    """A choice that the user has to allow."""

    values: Values
    """What it adds to the chosen settings."""
    needs: Allowed
    gain: Gain
    """Over the chosen settings."""


@dataclass(frozen=True, slots=True)
class TuneResult:
    """The fastest settings that were found, and how fast a run is with them."""

    tried: Values
    """The settings that won every comparison on the way; empty for the present ones."""
    final: Race
    """The present settings, those of `tried`, and the latter with an ideal loader or a free teacher."""
    races: Mapping[str, Race]
    """Every comparison on the way, by the name of the settings in it."""
    options: Sequence[Option]
    left_out: Mapping[str, str]
    """Choices that were not measured, with the reason."""
    seconds: float
    """How long it took."""
    environment: Mapping[str, Any]

    @property
    def gain(self) -> Gain:
        """Of `tried` over the present settings, in the last comparison."""
        return self.final.gain(Trial(self.tried))

    @property
    def values(self) -> dict[str, Any]:
        """The settings to change, by their dotted keys; none if nothing is faster by more than the noise."""
        return dict(self.tried) if self.gain.is_certain else {}

    @property
    def shares(self) -> dict[str, float]:
        """The parts of the time of a step, with `tried`, that go to loader, teacher and student: 0 to 1.

        That of the loader is what an ideal one would save, and so for the teacher.
        """
        parts: dict[str, Part] = {"loader": "no loader", "teacher": "no teacher"}
        shares = {}
        for name, part in parts.items():
            trial = Trial(self.tried, part)
            if trial in self.final.rates:
                shares[name] = max(0.0, 1 - 1 / self.final.over(trial, Trial(self.tried)).ratio)
        rest = "student" if Trial(self.tried, "student") in self.final.rates or "teacher" not in shares else "rest"
        return {**shares, rest: max(0.0, 1 - sum(shares.values()))}

    def table(self) -> str:
        """Plain text: the rates, what limits the run, the settings to change, and what else would be faster."""
        rows = []
        for trial, rates in self.final.rates.items():
            own = self.final.gain(trial)
            cells = (f"{rate:,.1f}" for rate in (median(rates), min(rates), max(rates)))
            rows.append([self._name(trial), *cells, f"{own.ratio:.2f}"])
        lines = format_table(["", "images/s", "lowest", "highest", "x present"], rows)
        num_rounds = len(self.final.rates[self.final.present])
        lines.append(f"Medians of {num_rounds} interleaved rounds in {self.seconds:.0f} s. {self._limit()}")
        lines += self._advice()
        lines += [
            f"{as_overrides(option.values)} would be {option.gain.ratio:.2f} times as fast as that, and "
            f"{ALLOWABLE[option.needs]}; to choose from it too: --allow {option.needs}"
            for option in self.options
            if option.gain.is_certain
        ]
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        if not self.values:
            tried = ", ".join(self.races) or "nothing"
            return [f"No other settings are faster by {MIN_GAIN:.0%} and more than the noise. Tried: {tried}."]
        lines = [f"{self.gain.ratio:.2f} times as fast with", f"  {as_overrides(self.tried)}"]
        if kept := [key for key in self.values if key in _KEPT_BY_A_RUN]:
            lines.append(f"A run that has begun keeps its {', '.join(kept)}: leave that out to resume it.")
        return lines

    def _limit(self) -> str:
        shares = self.shares
        if len(shares) == 1:
            return "What limits it was not measured."
        name = max(shares, key=lambda part: shares[part])
        parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        return f"The {name} limits it: {parts} of the time of a step."

    def _name(self, trial: Trial) -> str:
        if trial.part != "all":
            return f"  {_ROWS[trial.part]}"
        if not trial.values:
            return "present settings"
        return "with these settings" if self.values else "the best of the others"

    def to_json(self) -> str:
        """Everything, including every repeat."""
        found = {
            "values": self.values,
            "gain": _gain_dict(self.gain),
            "shares": self.shares,
            "final": _race_dict(self.final),
            "options": [
                {"values": dict(option.values), "needs": option.needs, "gain": _gain_dict(option.gain)}
                for option in self.options
            ],
            "races": {name: _race_dict(race) for name, race in self.races.items()},
            "left_out": self.left_out,
            "seconds": self.seconds,
            "environment": self.environment,
        }
        return json.dumps(found, indent=2)


def as_overrides(values: Values) -> str:
    """Settings as arguments of a command, such as `data.num_threads=2 train.num_threads=1`."""
    return " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values)


def _gain_dict(gain: Gain) -> dict[str, float | None]:
    return {"ratio": gain.ratio, "error": gain.error if gain.num_rounds > 1 else None}


def _race_dict(race: Race) -> dict[str, Any]:
    return {
        "images_per_s": [
            {
                "values": dict(trial.values),
                "part": trial.part,
                "gain": _gain_dict(race.gain(trial)),
                **spread(rates),
            }
            for trial, rates in race.rates.items()
        ],
        "failed": {as_overrides(trial.values) or trial.part: reason for trial, reason in race.failed.items()},
    }
