"""Write a report on runs: one HTML file to send on, with what was trained, how well, and at what cost."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline._core.paths import argument_path
from kd_pipeline._core.terminal_log import log_line, log_to_terminal
from kd_pipeline._core.version import __version__
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.report.answers import Answer
from kd_pipeline.report.data_uri import picture_uri
from kd_pipeline.report.document import Block, Document, Gallery, Heading, Picture, Section, Table, Text, Tile
from kd_pipeline.report.html import render
from kd_pipeline.workflows.reporting.cost import (
    check_blocks,
    config_blocks,
    environment_blocks,
    history_blocks,
    time_blocks,
)
from kd_pipeline.workflows.reporting.head import head_of
from kd_pipeline.workflows.reporting.neighbors import draw_neighbors
from kd_pipeline.workflows.reporting.results import class_blocks, curve_blocks, difference_blocks, result_blocks
from kd_pipeline.workflows.reporting.run import RunRecord, find_runs, inside, read_run
from kd_pipeline.workflows.reporting.samples import PREDICTIONS, Access, collect_samples, draw_training_batch

__all__ = ["write_report"]

_NUM_PICTURES = 60
_MAX_DETAILED = 6
"""Runs whose classes and samples are shown."""
_PICTURES = re.compile(r"(predictions_\w{1,40}|neighbors\w{0,40})\.png")
"""Pictures that a run has drawn itself."""
_MAX_DRAWN = 6


@log_to_terminal()
def write_report(
    runs: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str] | None = None,
    *,
    samples: bool = True,
    remote: bool = False,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    report: Callable[[str], object] = log_line,
) -> Path:
    """Write a report on one or several runs as a single HTML file, which loads nothing and runs no script.

    Everything is read from the folders of the runs. Pictures of samples are read from the data that a run's config
    names, and where the run has not kept what student and teacher say of each sample, the exported student is run on
    it. What is missing is left out, or a line says so.

    Args:
        runs: the folder of a run, or several, which are compared.
        out: the file; defaults to `report.html` in the folder of the first run.
        samples: whether to read images of the data, and to run the student where its answers are missing.
        remote: whether to read images from URLs, too, that a run's config names.
        plugins: modules that factories in the configs may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        report: called with lines of progress; without it they are logged.

    Returns:
        The file.

    Raises:
        ConfigError: there is no run, or the file cannot be written.
    """
    folders = [argument_path(run) for run in ([runs] if isinstance(runs, str | PathLike) else runs)]
    if not folders:
        raise ConfigError("there is nothing to report on: name the folder of a run")
    file = folders[0] / "report.html" if out is None else argument_path(out)
    found = _read(folders)
    prepare_output(file, kind="HTML file")
    title = _names(folders)[0] if len(folders) == 1 else "Comparison of runs"
    access = Access(samples, remote, plugins, trust_engines)
    write_output(file, render(_document(title, found, access, report)))
    return file


def _read(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs, each with its stages and students after it."""
    records: list[RunRecord] = []
    for name, folder in zip(_names(folders), folders, strict=True):
        parts = find_runs(folder)
        has_own = parts[0][0] == ""
        for part, path in parts:
            if part and any(path.samefile(each) for each in folders):
                continue  # it was named itself
            is_part = part in ("teacher", "baseline") or (has_own and part != "")
            shown = part if part and len(folders) == 1 else f"{name}/{part}".rstrip("/")
            records.append(read_run(path, shown, part_of=name if is_part else ""))
    return records


def _names(folders: Sequence[Path]) -> list[str]:
    """What runs are called: the last part of their paths, or as many as tell them apart."""
    for length in range(1, 4):
        names = ["/".join(folder.absolute().parts[-length:]) for folder in folders]
        if len({*names}) == len(folders):
            return names
    return [fspath(folder) for folder in folders]


def _document(title: str, records: Sequence[RunRecord], access: Access, report: Callable[[str], object]) -> Document:
    main = [record for record in records if not record.part_of] or [*records]
    head = head_of(title, main, records)
    parts: list[tuple[str, list[Block]]] = [("Results", [*result_blocks(records)])]
    if len(main) > 1:
        parts.append(("Differences", [*difference_blocks(main)]))
    parts += [
        ("Curves", [*curve_blocks(records)]),
        ("Classes", [*class_blocks(main[:_MAX_DETAILED])]),
        ("Samples", [*_sample_blocks(main[:_MAX_DETAILED], access, report)]),
        ("First training batch", [*_batch_blocks(main[0], access, report)]),
        ("Time and cost", [*time_blocks(records)]),
        ("Checks and files", [*check_blocks(records)]),
        ("History", [*history_blocks(records)]),
        ("Config", [*config_blocks(records)]),
        ("Environment", [*environment_blocks(main)]),
    ]
    sections = [Section(title, blocks, anchor=title.lower().replace(" ", "-")) for title, blocks in parts if blocks]
    footer = (
        f"Made by kd-pipeline report, kd_pipeline {__version__}. This file is complete in itself: it loads nothing "
        "from the network and runs no script."
    )
    return Document(head.title, head.summary, head.status, head.tone, head.cards, sections, footer, head.facts)


def _sample_blocks(runs: Sequence[RunRecord], access: Access, report: Callable[[str], object]) -> Iterator[Block]:
    """The samples of each run, and what it has drawn itself."""
    for run in runs:
        blocks = [*_drawn_blocks(run)] if access.samples else []
        is_classifier = any(
            found.miou is None and (found.top1 is not None or found.agreement is not None)
            for found in run.evaluations.values()
        )
        if is_classifier or _has_predictions(run):
            blocks += _chosen_blocks(run, access, _NUM_PICTURES // len(runs), report)
        elif not blocks and any(name.endswith("cosine_to_teacher.pooled") for name in run.metrics):
            uri, text = draw_neighbors(run, access, report=report)
            blocks.append(Text(text, "note") if uri is None else Picture(uri, text))
        if blocks:
            if len(runs) > 1:
                yield Heading(run.name)
            yield from blocks


def _has_predictions(run: RunRecord) -> bool:
    try:
        return inside(run.path, PREDICTIONS) is not None
    except KDPipelineError:
        return False


def _chosen_blocks(run: RunRecord, access: Access, number: int, report: Callable[[str], object]) -> Iterator[Block]:
    found = collect_samples(run, access, number=number, report=report)
    if found.counts:
        total = max(1, sum(found.counts.values()))
        yield Text("Of the validation images, by whose answer is the label:")
        rows = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in found.counts.items()]
        yield Table(["Answer", "Images", "Share"], rows)
    for note in found.notes:
        yield Text(note, "note")
    for group in found.groups:
        tiles = [_tile(row, found.pictures.get(row.index)) for row in group.rows]
        yield Gallery(group.title, group.note, tiles)


def _tile(row: Answer, uri: str | None) -> Tile:
    lines = [("label", row.label, "")] if row.label else []
    for who, answer, probability, is_right in (
        ("student", row.student, row.student_probability, row.student_is_right),
        ("teacher", row.teacher, row.teacher_probability, row.teacher_is_right),
    ):
        if answer:
            share = "" if probability is None else f" ({probability:.0%})"
            lines.append((who, f"{answer}{share}", "" if not row.label else "right" if is_right else "wrong"))
    name = "/".join(Path(row.path).parts[-2:]) if row.path else f"sample {row.index:,}"
    return Tile(uri, lines, name, is_tiny=uri is not None and uri.startswith("data:image/png"))


def _drawn_blocks(run: RunRecord) -> Iterator[Block]:
    """Pictures in the folder of the run: predictions of pixels, and nearest neighbors."""
    captions = {
        "predictions": "The first images, their masks, and the classes of pixels that teacher and student find.",
        "neighbors": "Images, and what each network finds most alike; a green frame is the same class, a red one not.",
    }
    for name in sorted(path.name for path in run.path.iterdir() if _PICTURES.fullmatch(path.name))[:_MAX_DRAWN]:
        try:
            if (path := inside(run.path, name)) is not None:
                yield Picture(picture_uri(path), captions[re.split(r"[_.]", name)[0].rstrip("0123456789")])
        except KDPipelineError as exc:
            yield Text(str(exc), "note")


def _batch_blocks(run: RunRecord, access: Access, report: Callable[[str], object]) -> Iterator[Block]:
    uri, text = draw_training_batch(run, access, report=report)
    yield Text(
        "What the student, and a teacher on the same view, are trained on, with crops and colors as they get them. "
        "A person who looks at it should be able to tell what it shows."
    )
    yield Text(text, "note")
    if uri is not None:
        yield Picture(uri, f"First training batch of {run.name}")
