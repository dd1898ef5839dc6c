"""Which samples a report shows: where the teacher is right and the student wrong, the worst, the best, and others."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kd_pipeline.report.answers import Answer

__all__ = ["Group", "choose", "count_answers"]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that are shown together."""

    title: str
    note: str
    rows: Sequence[Answer]


def count_answers(rows: Iterable[Answer]) -> dict[str, int]:
    """How many samples both have right, one or none; empty without labels or a teacher."""
    found = Counter((row.student_is_right, row.teacher_is_right) for row in rows if row.label and row.teacher)
    names = {
        (True, True): "both right",
        (False, True): "only the teacher right",
        (True, False): "only the student right",
        (False, False): "both wrong",
    }
    return {name: found[key] for key, name in names.items()} if found else {}


def choose(rows: Sequence[Answer], number: int) -> list[Group]:
    """At most `number` samples in groups; each sample is in one."""
    labeled = [row for row in rows if row.label]
    wrong = [row for row in labeled if not row.student_is_right]
    kinds: list[tuple[str, str, list[Answer], Callable[[Answer], float]]] = [
        (
            "Teacher right, student wrong",
            "What is still to be learned from the teacher. The student's surest answers come first.",
            [row for row in wrong if row.teacher_is_right],
            _sureness,
        ),
        (
            "Worst of the student" if any(row.teacher for row in rows) else "Worst",
            "The student's highest losses: hard images, mistaken labels, or classes that look alike.",
            wrong,
            lambda row: row.loss if row.loss is not None else _sureness(row),
        ),
        (
            "Student right, teacher wrong",
            "The student is not bound to its teacher's mistakes.",
            [row for row in labeled if row.student_is_right and row.teacher and not row.teacher_is_right],
            _sureness,
        ),
        (
            "Student and teacher disagree",
            "Without labels nobody knows who is right; the surest answers come first.",
            [row for row in rows if not row.label and row.teacher and row.teacher != row.student],
            _sureness,
        ),
        (
            "Least certain",
            "Images without a label for which the student's top class has the lowest probability.",
            [row for row in rows if not row.label],
            lambda row: -_sureness(row),
        ),
        (
            "Best of the student",
            "The lowest losses: what the student takes for the clearest images.",
            [row for row in labeled if row.student_is_right],
            lambda row: -row.loss if row.loss is not None else _sureness(row),
        ),
    ]
    kinds = [kind for kind in kinds if kind[2]]
    found, taken = [], set[int]()
    for title, note, candidates, key in kinds:
        free = (row for row in candidates if row.index not in taken)
        chosen = heapq.nlargest(max(1, number // len(kinds)), free, key=key)
        taken |= {row.index for row in chosen}
        if chosen:
            found.append(Group(f"{title} ({len(candidates):,})", note, chosen))
    return found


def _sureness(row: Answer) -> float:
    return row.student_probability or 0.0
