"""Which parts of a recording this process records, so that any number of processes on any machines share them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Self

from kd_pipeline._core.ranks import launched
from kd_pipeline._core.text import plural
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.recorded.manifest import RecordingManifest

__all__ = ["PART_PATTERN", "Share", "missing_lines"]

PART_PATTERN = r"[1-9]\d{0,8}/[1-9]\d{0,8}"
"""Of `--part`, such as `2/4`."""
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP")
_MAX_LINES = 8
"""Of what is missing, in a message."""


@dataclass(frozen=True, slots=True)
class Share:
    """Every n-th part of the recording, and of these every m-th, if a launcher started m processes for the n-th.

    Who records what depends on these numbers alone, so nobody has to ask the others.
    """

    number: int = 1
    """Of `count`, from 1."""
    count: int = 1
    rank: int = 0
    world_size: int = 1
    reason: str = ""
    """What says so."""

    @classmethod
    def of_process(cls, part: str | None) -> Self:
        """That of `part`, such as `2/4`, or else of the task of a SLURM array; divided among the ranks of a launcher.

        Raises:
            ConfigError: there is no such part, or the variables do not say the share.
        """
        found = launched()
        rank, world_size = (0, 1) if found is None else (found.rank, found.world_size)
        reasons = [] if found is None or world_size == 1 else [found.variables]
        number, count = 1, 1
        if part is not None:
            if not re.fullmatch(PART_PATTERN, part):
                raise ConfigError(f"--part is {part!r}; write which one of how many, such as 2/4, from 1/4 to 4/4")
            number, count = map(int, part.split("/"))
            if number > count:
                raise ConfigError(f"--part is {part}, and the last of {count} is {count}/{count}")
            reasons.insert(0, f"--part {part}")
        elif os.environ.get(_ARRAY[0]):
            number, count = _of_array()
            reasons.insert(0, f"{_ARRAY[0]}={os.environ[_ARRAY[0]]}, and --part 1/1 would record everything")
        return cls(number, count, rank, world_size, "; ".join(reasons if count > 1 or world_size > 1 else []))

    @property
    def num_processes(self) -> int:
        """Processes that record together."""
        return self.count * self.world_size

    @property
    def is_everything(self) -> bool:
        """Whether there is no other process."""
        return self.num_processes == 1

    @property
    def fraction(self) -> str:
        """` / 4` for one of four processes."""
        return "" if self.is_everything else f" / {self.num_processes}"

    def owns(self, number: int) -> bool:
        """Whether this process records the part with this number, counted from 0 through all epochs."""
        number, task = divmod(number, self.count)
        return task == self.number - 1 and number % self.world_size == self.rank

    def select(self, manifest: RecordingManifest, epochs: int) -> list[tuple[int, int]]:
        """Epoch and first position of each part of this process, in order."""
        starts = manifest.part_starts
        return [
            (epoch, start)
            for epoch in range(epochs)
            for place, start in enumerate(starts)
            if self.owns(epoch * len(starts) + place)
        ]

    def __str__(self) -> str:
        own = f"part {self.number}/{self.count}"
        return own if self.world_size == 1 else f"{own}, rank {self.rank} of {self.world_size}"


def _of_array() -> tuple[int, int]:
    """Number and count of this task of a SLURM array."""
    values = [os.environ.get(name, "1" if name.endswith("STEP") else "") for name in _ARRAY]
    if not all(value.isdecimal() for value in values):
        raise ConfigError(f"{', '.join(_ARRAY[:3])} are {values[:3]}, which are not all numbers; give --part i/n")
    task, first, last, step = map(int, values)
    count = (last - first) // max(step, 1) + 1
    if os.environ.get("SLURM_ARRAY_TASK_COUNT", str(count)) != str(count) or (task - first) % max(step, 1):
        raise ConfigError(
            f"the tasks of this SLURM array are not evenly spaced ({_ARRAY[0]} is {task}), so they do not say which "
            "part of the recording is whose; give --part i/n, or start it with sbatch --array=1-n"
        )
    return (task - first) // max(step, 1) + 1, count


def missing_lines(manifest: RecordingManifest, missing: Iterable[tuple[int, int]], count: int) -> list[str]:
    """What is missing, for people: where, and which of `count` processes records it.

    Args:
        manifest: of the recording.
        missing: epoch and first position of each part that is missing, in order.
        count: of the processes.
    """
    starts = manifest.part_starts
    spans: list[tuple[int, int, int, int]] = []
    """Epoch, first position, the position after the last, and whose they are."""
    for epoch, start in missing:
        number = (epoch * len(starts) + starts.index(start)) % count + 1
        stop = manifest.part_stop(start)
        if spans and spans[-1][0] == epoch and spans[-1][2] == start and spans[-1][3] == number:
            spans[-1] = (epoch, spans[-1][1], stop, number)
        else:
            spans.append((epoch, start, stop, number))
    lines = [
        f"epoch {epoch + 1}: positions {start}-{stop - 1}" + (f", part {number}/{count} has them" if count > 1 else "")
        for epoch, start, stop, number in islice(spans, _MAX_LINES)
    ]
    if len(spans) > _MAX_LINES:
        rest = len(spans) - _MAX_LINES
        lines.append(f"and {rest:,} more {plural(rest, 'span')} of positions")
    numbers = sorted({number for *_, number in spans})
    options = [f"--part {number}/{count}" for number in numbers[:_MAX_LINES]] if count > 1 else []
    if lines:
        lines.append(
            "run the same command with " + ", and with ".join(options) if options else "run the same command again"
        )
    return lines
