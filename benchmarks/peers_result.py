"""What the comparison with other programs found: rows, ratios within each repeat, and the tables that show them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.peers_process import ProgramRun
from benchmarks.peers_rows import LIGHTLY, TIMM
from benchmarks.tables import markdown_table, with_range
from kd_pipeline.bench.measure import format_table, spread

__all__ = ["COMPARISONS", "Comparison", "PeersResult", "PeersRow"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Comparison:
    """A number that is computed within each repeat, from the runs of some rows."""

    title: str
    rows: tuple[str, ...]
    value: Callable[..., float]
    """Gets a `ProgramRun` for each of `rows`."""
    target: str = ""
    """What it should be."""

    def values(self, runs: Mapping[str, Sequence[ProgramRun]]) -> list[float] | None:
        """One for each repeat, or None if a row was not measured."""
        if not set(self.rows) <= set(runs):
            return None
        return [self.value(*repeat) for repeat in zip(*(runs[row] for row in self.rows), strict=True)]


def _rate(own: ProgramRun, other: ProgramRun) -> float:
    """Images per second, relative to the other's."""
    return other.step_s / own.step_s


def _rate_of_sum(own: ProgramRun, student: ProgramRun, teacher: ProgramRun) -> float:
    """Images per second, relative to a step that takes as long as its parts one after the other."""
    return (student.step_s + teacher.step_s) / own.step_s


def _first_step(own: ProgramRun, other: ProgramRun) -> float:
    return own.first_step_s / other.first_step_s


def _end(own: ProgramRun, other: ProgramRun) -> float:
    return own.end_s - other.end_s


def _memory(own: ProgramRun, other: ProgramRun) -> float:
    return (own.peak_memory_bytes - other.peak_memory_bytes) / _GIB


_PAIRS = {
    f"{settings}, {precision}": (f"ours-{middle}{precision}", f"timm-{middle}{precision}")
    for settings, middle in (("default", ""), ("best", "best-"))
    for precision in ("fp32", "bf16")
}
_SPEED_TARGETS = {"default, fp32": "≥ 1.5", "default, bf16": "≥ 1.25", "best, fp32": "≥ 1.15", "best, bf16": "≥ 1.15"}

COMPARISONS = (
    *(Comparison(f"images/s, {name}: ours / timm", rows, _rate, _SPEED_TARGETS[name]) for name, rows in _PAIRS.items()),
    Comparison("images/s, teacher int8 / bf16: a step", ("ours-int8", "ours-bf16"), _rate),
    Comparison("images/s, teacher int8 / bf16: the teacher alone", ("teacher-int8", "teacher-bf16"), _rate, "≥ 1.2"),
    *(
        Comparison(
            f"images/s, {precision}: recorded / student alone",
            (f"recorded-{precision}", f"student-{precision}"),
            _rate,
            "≥ 0.97",
        )
        for precision in ("fp32", "bf16")
    ),
    *(
        Comparison(
            f"images/s, {precision}: a step / student alone after teacher alone",
            (f"ours-{precision}", f"student-{precision}", f"teacher-{precision}"),
            _rate_of_sum,
            "≥ 0.97",
        )
        for precision in ("fp32", "bf16")
    ),
    *(Comparison(f"first step, {name}: ours / timm", rows, _first_step, "≤ 1.3") for name, rows in _PAIRS.items()),
    *(Comparison(f"end, {name}: ours - timm, s", rows, _end) for name, rows in _PAIRS.items()),
    *(Comparison(f"peak memory, {name}: ours - timm, GiB", rows, _memory) for name, rows in _PAIRS.items()),
    *(
        Comparison(f"{title}, no labels, {precision}: {own} / lightly-train", (f"{row}-{precision}", theirs), value)
        for precision, theirs in (("fp32", "lightly-fp32"), ("bf16", "lightly-bf16"))
        for row, own in (("distill", "kd-pipeline train"), ("loop", "own loop"))
        for title, value in (("images/s", _rate), ("first step", _first_step))
    ),
)


@dataclass(frozen=True, slots=True)
class PeersRow:
    """All runs of one row."""

    name: str
    program: str
    options: str
    cold: ProgramRun
    """The first run, with empty caches."""
    warm: tuple[ProgramRun, ...]
    """The others, one in each repeat."""


@dataclass(frozen=True, slots=True)
class PeersResult:
    """All rows, those that are left out and why, the settings and the environment."""

    rows: tuple[PeersRow, ...]
    left_out: Mapping[str, str]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    def compared(self) -> dict[Comparison, list[float]]:
        """The comparisons whose rows were all measured, with the value in each repeat."""
        runs = {row.name: row.warm for row in self.rows}
        found = {comparison: comparison.values(runs) for comparison in COMPARISONS}
        return {comparison: values for comparison, values in found.items() if values is not None}

    def table(self) -> str:
        """Plain text."""
        return "\n".join(
            [
                *format_table(_ROW_HEADER, self._row_cells()),
                "",
                *format_table(_COMPARISON_HEADER, self._comparison_cells()),
                "",
                *self._notes(),
            ]
        )

    def markdown(self) -> str:
        """The same for the documentation."""
        parts = [
            markdown_table(_ROW_HEADER, self._row_cells()),
            markdown_table(_COMPARISON_HEADER, self._comparison_cells()),
            "\n".join(f"- {note}" for note in self._notes()),
        ]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> str:
        """Everything, including every run."""
        rows = []
        for row in self.rows:
            rates = [self._images_per_s(run.step_s) for run in row.warm]
            means = [self._images_per_s(run.mean_step_s) for run in row.warm]
            rows.append(asdict(row) | {"images_per_s": spread(rates), "mean_images_per_s": spread(means)})
        comparisons = [
            {"title": each.title, "rows": each.rows, "target": each.target} | spread(values)
            for each, values in self.compared().items()
        ]
        found = {"rows": rows, "comparisons": comparisons, "left_out": self.left_out}
        return json.dumps(found | {"settings": self.settings, "environment": self.environment}, indent=2)

    def _images_per_s(self, step_s: float) -> float:
        return float(self.settings["batch_size"] / step_s)

    def _row_cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                " ".join(filter(None, (row.program, row.options))),
                with_range([self._images_per_s(run.step_s) for run in row.warm], 1),
                f"{median(self._images_per_s(run.mean_step_s) for run in row.warm):.1f}",
                f"{median(run.first_line_s for run in row.warm):.2f}",
                with_range([run.first_step_s for run in row.warm], 2),
                f"{row.cold.first_step_s:.2f}",
                with_range([run.end_s for run in row.warm], 2),
                f"{row.cold.end_s:.2f}",
                with_range([run.peak_memory_bytes / _GIB for run in row.warm], 2),
            )
            for row in self.rows
        ]

    def _comparison_cells(self) -> list[tuple[str, ...]]:
        return [(each.title, with_range(values, 2), each.target) for each, values in self.compared().items()]

    def _notes(self) -> list[str]:
        versions = [f"{name} {version}" for name, version in self.environment["programs"].items()]
        programs = {TIMM: "timm's train.py", LIGHTLY: "lightly-train"}
        return [
            f"Median (lowest-highest) of {len(self.rows[0].warm)} interleaved repeats on {self.environment['cpu']}, "
            f"{self.environment['num_cores']} core(s), with warm caches; ratios and differences are within each "
            "repeat. Cold: one run before them, with an empty cache for each row.",
            f"Each run is a process of its own, with {self.settings['steps']} batches of "
            f"{self.settings['batch_size']} photographs. images/s: from the median interval between optimizer steps "
            "without the first and the last, as the last step has no teacher in it where a batch is prepared ahead. "
            "mean: from all intervals but the last.",
            "first line, first step: from the start of the process. end: from the last step to the end of the process. "
            "Memory: of the process and its children, what they share counted once, sampled once a second.",
            f"Versions: {', '.join((*versions, *self._own_versions()))}.",
            *(f"Left out, {programs.get(name, name)}: {reason}." for name, reason in self.left_out.items()),
        ]

    def _own_versions(self) -> list[str]:
        packages = ("kd_pipeline", "torch", "timm", "openvino")
        versions = self.environment["versions"]
        return [f"{name} {versions[name]}" for name in packages if name in versions]


_ROW_HEADER = (
    "row",
    "program and options",
    "images/s",
    "mean",
    "first line s",
    "first step s",
    "cold",
    "end s",
    "cold",
    "peak GiB",
)
_COMPARISON_HEADER = ("comparison", "median (lowest-highest)", "target")
