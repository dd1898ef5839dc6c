"""The result of `bench step`: rows, their ratios, the bottleneck in words, and a plot of where the time goes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from kd_pipeline._core.cpu_features import trains_faster_in_bf16
from kd_pipeline.bench.measure import format_table, paired_ratio, spread
from kd_pipeline.bench.step_variants import PARTS, PHASES
from kd_pipeline.bench.step_worker import StepSample
from kd_pipeline.report.advice import advice_for
from kd_pipeline.report.plots import Bar, plot_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StepResult", "StepRow"]

_RATIOS = (
    *(("e", other) for other in "abcdf"),
    *(("g", other) for other in "ef"),
    *(("c", other) for other in "abfh"),
    ("b", "a"),
)


@dataclass(frozen=True, slots=True)
class StepRow:
    """What was measured of one variant, a sample for each repeat."""

    letter: str
    name: str
    samples: tuple[StepSample, ...]

    @property
    def images_per_s(self) -> tuple[float, ...]:
        """Of each repeat."""
        return tuple(sample.images_per_s for sample in self.samples)

    @property
    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of a step, the median for each phase."""
        return {phase: median(sample.phases_ms[phase] for sample in self.samples) for phase in PHASES}

    def ratio(self, other: "StepRow") -> float:
        """How many times as fast as `other`."""
        return paired_ratio(self.images_per_s, other.images_per_s)

    def to_dict(self) -> dict[str, Any]:
        """All numbers with all repeats."""
        found: dict[str, Any] = {"row": self.letter, "name": self.name}
        for name in ("images_per_s", "ms_per_step", "host_bytes", "device_bytes", "copied_bytes_per_image"):
            if known := [value for sample in self.samples if (value := getattr(sample, name)) is not None]:
                found[name] = spread(known)
        if (decode := self.samples[0].decode) is not None:
            found["decode"] = decode
        found["phases_ms"] = {phase: spread([sample.phases_ms[phase] for sample in self.samples]) for phase in PHASES}
        return found


@dataclass(frozen=True, slots=True)
class StepResult:
    """All rows in the order of their letters, then the parts; the settings and the environment."""

    rows: tuple[StepRow, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def row(self, letter: str) -> StepRow | None:
        """The row of that letter, if it was measured."""
        return next((row for row in self.rows if row.letter == letter), None)

    @property
    def overhead(self) -> float | None:
        """How much longer an image takes in `compared` than at the limit, as a fraction of the limit.

        On a CPU, where all share the cores, the limit is the sum of loading, teacher and student alone. On a GPU, which
        teacher and student share, it is the larger of loading alone and of the sum of teacher and student alone. The
        median over the repeats; None if that row or a part was not measured.
        """
        return median(self.overheads) if self.overheads else None

    @property
    def overheads(self) -> list[float]:
        """`overhead` in each repeat; empty if it is None."""
        rows = [row for letter in (self.compared, *PARTS) if (row := self.row(letter)) is not None]
        if len(rows) <= len(PARTS):
            return []
        times_s = [[1 / rate for rate in row.images_per_s] for row in rows]
        limit = _limit_on_cpu if self.settings["device"] == "cpu" else _limit_on_gpu
        return [step_s / limit(*parts_s) - 1 for step_s, *parts_s in zip(*times_s, strict=True)]

    @property
    def compared(self) -> str:
        """The row that is compared with the limit: (e), or (c) where (e) does not work; their teacher is a part."""
        return str(self.settings["compared"])

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast one row is as another, for those that were measured, such as `e/a`."""
        rows = {row.letter: row for row in self.rows}
        return {f"{one}/{other}": rows[one].ratio(rows[other]) for one, other in _RATIOS if {one, other} <= rows.keys()}

    @property
    def advice(self) -> str:
        """What takes most of the time of (e), or of the closest row to it, and which setting to change."""
        row = next((row for letter in "edchgba" if (row := self.row(letter)) is not None), None)
        if row is None:
            return "no advice: no row with the complete step was measured"
        phases_ms = row.phases_ms
        phase = max(phases_ms, key=lambda phase: phases_ms[phase])
        share = f"In ({row.letter}) {phases_ms[phase] / sum(phases_ms.values()):.0%} of the time goes into"
        gains = self.settings["precision"] == "fp32" and (self.settings["device"] != "cpu" or trains_faster_in_bf16())
        return advice_for(phase, share, gains_from_bf16=gains, is_compiled=True)

    def table(self) -> str:
        """Plain text: a line for each row, and below them how they compare."""
        first = self.rows[0]
        on_gpu = first.samples[0].device_bytes is not None
        header = ["", "images/s", "lowest", "highest", f"x ({first.letter})", *(f"{phase} ms" for phase in PHASES)]
        header += ["host MiB", *(["GPU MiB", "B/image copied"] if on_gpu else [])]
        rows = []
        for row in self.rows:
            label, rates, last = f"({row.letter})" if len(row.letter) == 1 else "   ", row.images_per_s, row.samples[-1]
            cells = [f"{label} {row.name}", *(f"{rate:,.1f}" for rate in (median(rates), min(rates), max(rates)))]
            cells += [f"{row.ratio(first):.2f}", *(f"{row.phases_ms[phase]:,.0f}" for phase in PHASES)]
            cells.append(f"{max(sample.host_bytes for sample in row.samples) / 2**20:,.0f}")
            if on_gpu:
                cells += [f"{(last.device_bytes or 0) / 2**20:,.0f}", f"{last.copied_bytes_per_image or 0:,.0f}"]
            rows.append(cells)
        lines = format_table(header, rows)
        lines.append(
            f"Medians of {len(first.samples)} interleaved repeats, each row in its own process, on "
            f"{self.environment['num_cores']} core(s), {self.settings['device']}. Student in "
            f"{self.settings['precision']}, compiled teachers in {self.settings['teacher_precision']}, batch "
            f"{self.settings['batch_size']}, loss {self._loss}."
        )
        if self.overhead is not None:
            on_gpu_limit = "the larger of loading alone and of teacher plus student, which share the GPU, alone"
            limit = "the sum of its parts alone" if self.settings["device"] == "cpu" else on_gpu_limit
            lines.append(f"({self.compared}) takes {self.overhead:+.1%} of time over {limit}.")
        return "\n".join([*lines, self.advice])

    @property
    def _loss(self) -> str:
        terms = [f"{term['loss']} on {term['student']}" for term in self.settings["distill"]["features"]]
        return " + ".join(filter(None, [self.settings["distill"]["loss"], *terms]))

    def to_json(self) -> str:
        """Everything, including every repeat."""
        found = {
            "rows": [row.to_dict() for row in self.rows],
            "ratios": self.ratios,
            "compared": self.compared,
            "overhead": self.overhead,
            "overheads": self.overheads,
            "advice": self.advice,
            "settings": self.settings,
            "environment": self.environment,
        }
        return json.dumps(found, indent=2)

    def plot(self) -> "Figure":
        """Draw how the time of a step splits into phases, a bar for each row."""
        bars = [
            Bar(f"({row.letter}) {row.name}", row.phases_ms, f"{median(row.images_per_s):,.1f} images/s")
            for row in self.rows
            if len(row.letter) == 1
        ]
        return plot_bars(bars, title="Where the time of a step goes", x="milliseconds")


def _limit_on_cpu(student_s: float, loader_s: float, teacher_s: float) -> float:
    return student_s + loader_s + teacher_s


def _limit_on_gpu(student_s: float, loader_s: float, teacher_s: float) -> float:
    return max(loader_s, teacher_s + student_s)
