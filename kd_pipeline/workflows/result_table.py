"""The metrics of a stage's network and of its teacher, as a table of text."""

from collections.abc import Iterator, Mapping, Sequence

from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._features import COSINE

__all__ = ["result_rows", "result_table", "students_table"]

_KNN, _LINEAR = "knn_top1", "linear_top1"
_TITLES = {_KNN: "k-NN", _LINEAR: "linear"}
_MANY_CLASSES = 5
"""Top-5 is shown where there are more."""

_Row = dict[str, str]
"""The cells of a row by the title of their column."""


def result_table(evaluations: Mapping[str, Evaluation], *, trained: str) -> tuple[str, ...]:
    """The lines of the table, the titles of its columns first; none if nothing was measured.

    Args:
        evaluations: metrics of the network that was trained, and of its teacher, by split.
        trained: what that network is called.
    """
    return _table([row for split, found in evaluations.items() for row in result_rows(split, found, trained)])


def students_table(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> tuple[str, ...]:
    """The lines of one table for several students, by name and split; a teacher has one row in each split."""
    splits = dict.fromkeys(split for found in evaluations.values() for split in found)
    rows: list[_Row] = []
    for split in splits:
        named = {name: found[split] for name, found in evaluations.items() if split in found}
        found = [result_rows(split, each, name) for name, each in named.items()]
        by_network = {row["network"]: row for each in found for row in each}
        rows += sorted(by_network.values(), key=lambda row: row["network"] not in evaluations)
    return _table(rows)


def _table(rows: Sequence[_Row]) -> tuple[str, ...]:
    """The lines of rows, the titles of the columns first."""
    if not rows:
        return ()
    titles = [*dict.fromkeys(title for row in rows for title in row)]
    widths = {title: max(len(title), *(len(row.get(title, "")) for row in rows)) for title in titles}

    def line(cells: Mapping[str, str]) -> str:
        texts = [
            cells.get(title, "").ljust(width) if number < 2 else cells.get(title, "").rjust(width)
            for number, (title, width) in enumerate(widths.items())
        ]
        return "  ".join(texts).rstrip()

    return line({title: title for title in titles}), *map(line, rows)


def result_rows(split: str, found: Evaluation, trained: str) -> Iterator[_Row]:
    """The cells by column for the network, and for each teacher of which something is known."""
    teachers = [name.removesuffix(f"_{_KNN}") for name in found.metrics if name.endswith(f"_{_KNN}")]
    of_teachers = {f"{teacher}_{metric}" for teacher in teachers for metric in _TITLES}
    own = _cells(found) | _further(found, without=of_teachers)
    if not own:
        return
    yield {"split": split, "network": trained, "samples": f"{found.num_samples:,}" if found.num_samples else "", **own}
    judged = {
        teacher: {
            title: _percent(found.metrics[f"{teacher}_{metric}"])
            for metric, title in _TITLES.items()
            if f"{teacher}_{metric}" in found.metrics
        }
        for teacher in teachers
    }
    if found.teacher is not None and (cells := _cells(found.teacher)):
        judged["teacher"] = cells | judged.get("teacher", {})
    for teacher, cells in judged.items():
        yield {"split": split, "network": teacher, "samples": f"{found.num_samples:,}", **cells}


def _cells(found: Evaluation) -> _Row:
    """What every network with logits has."""
    shows_top5 = found.class_accuracy is None or len(found.class_accuracy) > _MANY_CLASSES
    metrics = {
        "top-1": found.top1,
        "top-5": found.top5 if shows_top5 else None,
        "F1": found.macro_f1,
        "mIoU": found.miou,
        "pixels": found.pixel_accuracy,
        "agreement": found.agreement,
    }
    cells = {title: _percent(value) for title, value in metrics.items() if value is not None}
    return cells if found.loss is None else cells | {"loss": f"{found.loss:.4g}"}


def _further(found: Evaluation, *, without: set[str]) -> _Row:
    """The further metrics that are single numbers."""
    cells = {}
    for name, value in found.metrics.items():
        if name in without or isinstance(value, bool) or not isinstance(value, float | int):
            continue
        if name in _TITLES:
            cells[_TITLES[name]] = _percent(value)
        elif name.startswith(f"{COSINE}."):
            cells[f"cosine {name.removeprefix(f'{COSINE}.')}"] = f"{value:.3f}"
        else:
            cells[name] = f"{value:.4g}"
    return cells


def _percent(value: float) -> str:
    return f"{value:.1%}"
