"""What `bench step` found: rows, how they compare, the bottleneck in plain words, and a picture of where time goes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kd_pipeline.bench.isolated import StepSample
from kd_pipeline.bench.measure import ratio_within_repeats, spread
from kd_pipeline.bench.ways import PHASES
from kd_pipeline.report.bars import Bar, save_bars

__all__ = ["StepResult", "StepRow"]

_MIB = 2**20
_PARTS = ("loader", "teacher")


@dataclass(frozen=True, slots=True)
class StepRow:
    """What was measured of one way, a sample for each repeat."""

    letter: str
    name: str
    samples: tuple[StepSample, ...]

    @property
    def images_per_s(self) -> tuple[float, ...]:
        """Of each repeat."""
        return tuple(sample.images_per_s for sample in self.samples)

    @property
    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of a step, the median of each phase."""
        return {phase: median(sample.phases_ms[phase] for sample in self.samples) for phase in PHASES}

    def ratio(self, other: "StepRow") -> float:
        """How many times as fast as `other`."""
        return ratio_within_repeats(self.images_per_s, other.images_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Every repeat of every figure."""
        first = self.samples[0]
        found: dict[str, Any] = {
            "row": self.letter,
            "name": self.name,
            "images_per_s": spread(self.images_per_s),
            "ms_per_step": spread([sample.ms_per_step for sample in self.samples]),
            "phases_ms": {phase: spread([sample.phases_ms[phase] for sample in self.samples]) for phase in PHASES},
            "host_bytes": spread([sample.host_bytes for sample in self.samples]),
        }
        if first.device_bytes is not None:
            found["device_bytes"] = spread([sample.device_bytes or 0 for sample in self.samples])
        if first.copied_bytes_per_image is not None:
            found["copied_bytes_per_image"] = spread([sample.copied_bytes_per_image or 0.0 for sample in self.samples])
        return found


@dataclass(frozen=True, slots=True)
class StepResult:
    """All rows in the order of their letters, then the parts; and the circumstances."""

    rows: tuple[StepRow, ...]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def row(self, letter: str) -> StepRow | None:
        """The row of that letter, where it was measured."""
        return next((row for row in self.rows if row.letter == letter), None)

    @property
    def overhead(self) -> float | None:
        """How much longer an image takes in (e) than at the limit, as a part of that.

        On a CPU, where all share the cores, the limit is the sum of loading, teacher and student alone; on a GPU the
        largest of them. The median over the repeats; None where (e) or a part was not measured.
        """
        found = [self.row(letter) for letter in ("e", "f", *_PARTS)]
        rows = [row for row in found if row is not None]
        if len(rows) < len(found):
            return None
        limit: Callable[[list[float]], float] = sum if self.settings["device"] == "cpu" else max
        times_s = [[1 / rate for rate in row.images_per_s] for row in rows]
        return float(median(whole / limit(parts) - 1 for whole, *parts in zip(*times_s, strict=True)))

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as the other one row is, by both letters, of those that were measured."""
        pairs = (("e", "a"), ("e", "b"), ("e", "c"), ("e", "d"), ("e", "f"), ("g", "e"), ("g", "f"), ("b", "a"))
        rows = {row.letter: row for row in self.rows}
        return {f"{one}/{other}": rows[one].ratio(rows[other]) for one, other in pairs if {one, other} <= rows.keys()}

    @property
    def advice(self) -> str:
        """What takes most of the time of (e), or of the row that comes nearest to it, and the setting to change."""
        row = next((row for letter in "edcgba" if (row := self.row(letter)) is not None), None)
        if row is None:
            return "nothing to advise: no row with all of the step was measured"
        phases_ms = row.phases_ms
        total_ms = sum(phases_ms.values())
        phase = max(phases_ms, key=lambda phase: phases_ms[phase])
        share = f"In ({row.letter}) {phases_ms[phase] / total_ms:.0%} of the time goes into"
        match phase:
            case "teacher":
                return (
                    f"{share} the teacher: lower teacher.precision, take a smaller teacher, or record its answers once "
                    "with kd-pipeline record where epochs are few"
                )
            case "loader":
                return (
                    f"{share} waiting for the loader: raise data.num_threads up to the cores there are, lower "
                    "transform.size, store smaller images, or on a GPU raise data.ahead"
                )
        faster = "set train.precision to bf16-mixed, or " if self.settings["precision"] == "fp32" else ""
        return (
            f"{share} the {phase}, which no loader and no teacher can change: {faster}take a smaller student or "
            "smaller images; train.compile is worth its time, as it is in these rows"
        )

    def table(self) -> str:
        """Plain text: a line for each row, and below how they compare."""
        width = max(len(row.name) for row in self.rows)
        first = self.rows[0]
        lines = [f"{'':{width + 4}}  images/s (lowest-highest)   x ({first.letter})  {_phase_titles()}  host MiB"]
        for row in self.rows:
            label = f"({row.letter})" if len(row.letter) == 1 else "   "
            lines.append(f"{label} {row.name:{width}}  {self._figures(row)}")
        lines.append(
            f"Medians of {len(first.samples)} interleaved repeats, each row in a process of its own, on "
            f"{self.environment['num_cores']} core(s), {self.settings['device']}. Student in "
            f"{self.settings['precision']}, compiled teachers in {self.settings['teacher_precision']}, batch "
            f"{self.settings['batch_size']}."
        )
        if self.overhead is not None:
            limit = "the sum of its parts" if self.settings["device"] == "cpu" else "its largest part"
            lines.append(f"(e) takes {self.overhead:+.1%} of time over {limit} alone.")
        lines.append(self.advice)
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, every repeat included."""
        found = {
            "rows": [row.to_dict() for row in self.rows],
            "ratios": self.ratios,
            "overhead_of_e": self.overhead,
            "advice": self.advice,
            "settings": self.settings,
            "environment": self.environment,
        }
        return json.dumps(found, indent=2)

    def save(self, path: Path) -> None:
        """Write the JSON file, and beside it the picture of where the time of each row goes."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        bars = [
            Bar(f"({row.letter}) {row.name}", row.phases_ms, f"{median(row.images_per_s):,.1f} images/s")
            for row in self.rows
            if row.letter not in _PARTS
        ]
        save_bars(bars, path.with_suffix(".png"), title="milliseconds of a step", unit="ms")

    def _figures(self, row: StepRow) -> str:
        rates = row.images_per_s
        phases = "  ".join(f"{row.phases_ms[phase]:{_width(phase)},.0f}" for phase in PHASES)
        line = (
            f"{median(rates):8,.1f} ({min(rates):,.1f}-{max(rates):,.1f})".ljust(27)
            + f"{row.ratio(self.rows[0]):6.2f}  {phases}  {max(it.host_bytes for it in row.samples) / _MIB:8,.0f}"
        )
        last = row.samples[-1]
        if last.device_bytes is not None and last.copied_bytes_per_image is not None:
            line += (
                f"  {last.device_bytes / _MIB:,.0f} MiB on the GPU, {last.copied_bytes_per_image:,.0f} B/image copied"
            )
        return line


def _phase_titles() -> str:
    return "  ".join(f"{phase} ms".rjust(_width(phase)) for phase in PHASES)


def _width(phase: str) -> int:
    return len(phase) + 3
