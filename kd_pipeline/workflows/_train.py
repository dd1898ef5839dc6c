"""Train from a config and objects of the user's: run stages, each in a folder that can be resumed and reproduced."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from kd_pipeline._core.settings import require_config
from kd_pipeline._core.terminal_log import log_to_terminal
from kd_pipeline.config.config import Config
from kd_pipeline.errors import ConfigError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.settings import AnyTeacherSettings
from kd_pipeline.training.distributed import init_distributed, is_restart, on_rank_zero
from kd_pipeline.training.own_optimizer import OwnOptimizer
from kd_pipeline.training.trainer import check_lightning
from kd_pipeline.workflows.parts import Loss, Parts, Validate
from kd_pipeline.workflows.stage import Stage
from kd_pipeline.workflows.stage_run import StageRun, folder_of
from kd_pipeline.workflows.students import train_students
from kd_pipeline.workflows.train_result import TrainResult

__all__ = ["Stage", "TrainResult", "train"]

_logger = logging.getLogger("kd_pipeline")


@log_to_terminal()
def train(
    config: Config | None = None,
    *,
    student: nn.Module | None = None,
    teacher: Teacher | nn.Module | Recording | AnyTeacherSettings | None = None,
    train_batches: Any = None,
    validation: Any = None,
    distillation: Loss | None = None,
    validate: Validate | None = None,
    optimizer: OwnOptimizer | None = None,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Any] = (),
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    fresh: bool = False,
    report: Callable[[str], object] | None = None,
) -> TrainResult:
    """Run the stage that `config` names, or resume it from the last checkpoint in its folder.

    `distill` writes into `run_dir`, `teacher` and `baseline` into subfolders of these names. A stage that has finished
    is not trained further. A changed setting is applied and logged if that continues the same training, such as
    `train.epochs`, and refused otherwise.

    With `students`, each of them writes into a subfolder of its name, as a run of its own does. One that fails ends
    alone, and the result says why; if all fail, the error of the first is raised.

    Every part may be an object of yours, and the rest comes from the config:

        train(Config(run_dir="runs/mine"), student=student, teacher=teacher, train_batches=loader)

    What is ours resumes exactly. A line says what of your objects cannot be checked or restored.

    What a run says of itself is logged to `kd_pipeline`, at level INFO. Without any handler in `logging` it is shown on
    stderr; `logging.getLogger("kd_pipeline").setLevel("WARNING")` before the call leaves warnings and the bar.

    Args:
        config: the whole run, but for the parts that are given as objects; its `run_dir` is always needed.
        student: the network to train, in place. It has the weights of the result when this returns; with
            `strategy: fsdp` each rank has its part of them.
        teacher: an open teacher, a module, which is opened for what the loader gives, a recording, or settings. None
            takes that of the config, or of `train_batches` if that has one.
        train_batches: a `KDDataLoader` or `BatchLoader`, any iterable of batches that can be iterated again, which is
            wrapped in a `BatchLoader`, or a Lightning data module, whose validation loaders count if `validation` is
            None.
        validation: one such, which is called `val`, or several by name; `test` is for the end alone. It replaces the
            splits of the config for validation.
        distillation: a `Distillation`, or a function of what the student returns and the batch, which is the whole
            loss: a scalar, the mean over the valid rows. It replaces `config.distill`. A teacher is then optional.
        validate: a function of the student and the validation loaders by name, on each rank with its part of them. It
            returns numbers by name, instead of the built-in metrics: `wer` is logged as `val/wer`, and a name with a
            `/` as it is. Each may be `train.select_by`.
        optimizer: an optimizer of the parameters, or it with its scheduler, which steps after each of its steps, or a
            function that makes either of a module with all parameters to train. It replaces `train.optimizer` and
            `train.schedule`.
        callbacks: Lightning callbacks; early stopping and checkpoints come after them.
        loggers: Lightning loggers besides those of the config. They stay open.
        plugins: modules that factories and losses in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        fresh: start from the beginning. The files of an earlier run are moved to `earlier/1`, or the next number; class
            lists, recordings and other stages stay. With `stage: all` both stages start again.
        report: called on rank zero with each of the `lines` of a stage's result, after the model is exported; without
            it they are logged.

    Returns:
        The result of the last stage; for several students its `students` and `failures`.

    Raises:
        ConfigError: the config lacks something that this stage needs, or an object is of the wrong kind or given twice.
        StateError: the folder holds a run that this one would not continue, or another process uses it.
        DataError, TeacherError: the data or the teacher does not match the config.
        SystemExit: a signal stopped the run, which was saved: 143 for SIGTERM and SIGUSR1, 130 for Ctrl-C.
    """
    for name, given in (("callbacks", callbacks), ("loggers", loggers)):
        if not isinstance(given, Iterable):
            raise ConfigError(f"{name} should be a list, got {type(given).__qualname__}; put it into brackets")
    parts = Parts(
        student=student,
        teacher=teacher,
        train_batches=train_batches,
        validation=validation,
        distillation=distillation,
        validate=validate,
        optimizer=optimizer,
        callbacks=tuple(callbacks),
        loggers=tuple(loggers),
    )
    check_lightning(callbacks, loggers)
    config = Config() if config is None else config
    require_config(config)
    config = parts.in_config(config)
    stages: tuple[Stage, ...] = ("teacher", "distill") if config.stage == "all" else (config.stage,)
    init_distributed(config.data.device)
    if fresh and not is_restart():
        on_rank_zero(lambda: _archive(config, stages))
    for stage in stages:
        if config.students and stage != "teacher":
            result = train_students(config, stage, parts, plugins, trust_engines, report)
            continue
        with StageRun(config, stage, parts, plugins, trust_engines, report) as run:
            result = run.run()
    return result


def _archive(config: Config, stages: Iterable[Stage]) -> None:
    for stage in stages:
        configs = [] if stage == "teacher" or not config.students else config.single_runs.values()
        for folder in (folder_of(config, stage), *(folder_of(each, stage) for each in configs)):
            if (target := folder.archive()) is not None:
                _logger.warning(
                    "starting again: the earlier run in %s was moved to %s; leave out --fresh to resume the new one",
                    *(folder.path, target),
                )
