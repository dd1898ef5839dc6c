"""Train from a config: run its stages, each in a folder of its own that can be resumed and reproduced."""

import logging
from collections.abc import Callable, Collection, Iterable

from kd_pipeline.config.config import Config
from kd_pipeline.training.distributed import init_distributed, is_restart, on_rank_zero
from kd_pipeline.workflows.stage import Stage
from kd_pipeline.workflows.stage_run import StageRun, folder_of
from kd_pipeline.workflows.train_result import TrainResult

__all__ = ["Stage", "TrainResult", "train"]

_logger = logging.getLogger("kd_pipeline")


def train(
    config: Config,
    *,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    fresh: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> TrainResult:
    """Run the stage that `config` names, or resume it from the last checkpoint in its folder.

    `distill` writes into `run_dir`, `teacher` and `baseline` into subfolders of these names. A stage that has finished
    is not trained further. A changed setting is applied and logged if that continues the same training, such as
    `train.epochs`, and refused otherwise.

    Args:
        config: the whole run.
        plugins: modules that factories and losses in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        fresh: start from the beginning. The files of an earlier run are moved to `earlier/1`, or the next number; class
            lists, recordings and other stages stay. With `stage: all` both stages start again.
        report: called on rank zero with each of the `lines` of a stage's result, after the model is exported.

    Returns:
        The result of the last stage.

    Raises:
        ConfigError: the config lacks something that this stage needs.
        StateError: the folder holds a run that this one would not continue, or another process uses it.
        DataError, TeacherError: the data or the teacher does not match the config.
        SystemExit: a signal stopped the run, which was saved: 143 for SIGTERM and SIGUSR1, 130 for Ctrl-C.
    """
    stages: tuple[Stage, ...] = ("teacher", "distill") if config.stage == "all" else (config.stage,)
    init_distributed(config.data.device)
    if fresh and not is_restart():
        on_rank_zero(lambda: _archive(config, stages))
    for stage in stages:
        with StageRun(config, stage, plugins, trust_engines, report) as run:
            result = run.run()
    return result


def _archive(config: Config, stages: Iterable[Stage]) -> None:
    for stage in stages:
        folder = folder_of(config, stage)
        if (target := folder.archive()) is not None:
            _logger.warning(
                "starting again: the earlier run in %s was moved to %s; leave out --fresh to resume the new one",
                *(folder.path, target),
            )
