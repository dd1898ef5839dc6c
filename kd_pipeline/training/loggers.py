"""Where a run's numbers go: `metrics.csv`, and loggers of Lightning's by name, which get its settings too."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from kd_pipeline._core.optional import require
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.training.metrics_csv import MetricsFile
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.settings import LoggerName

__all__ = ["log_outcome", "log_settings", "open_loggers"]

_logger = logging.getLogger("kd_pipeline")


def open_loggers(names: Collection[LoggerName], folder: RunFolder, step: int | None) -> list[Any]:
    """Loggers for a `Trainer`.

    Args:
        names: which; `tensorboard` is left out, with a line, where it is not installed.
        folder: gets their files. Where a service, a directory or a server is to be used instead is said in the
            environment, in their own words: `WANDB_MODE`, `COMET_API_KEY`, `MLFLOW_TRACKING_URI` and so on.
        step: where a run goes on; it does so in its `metrics.csv`.

    Raises:
        MissingPackageError: a logger is asked for by name and not installed.
    """
    return [logger for name in dict.fromkeys(names) if (logger := _open(name, folder, step)) is not None]


def log_settings(loggers: Iterable[Any], config: BaseModel) -> None:
    """Record all that was set, by dotted names; `config.yaml` beside `metrics.csv` has it anyway."""
    found = _flat(config.model_dump(mode="json", exclude_none=True))
    for logger in _services(loggers):
        if logger.name == "tensorboard":
            # Settings without a figure never reach its event file; the table of runs comes with the outcome.
            text = "".join(f"    {name}: {value}\n" for name, value in found.items())
            logger.experiment.add_text("config", text)
        else:
            logger.log_hyperparams(found)


def log_outcome(loggers: Iterable[Any], config: BaseModel, found: Mapping[str, Evaluation], step: int) -> None:
    """Record what came of the exported network on each split, such as `final/val/top1`, and close the loggers."""
    final = {f"final/{split}/{name}": value for split, each in found.items() for name, value in each.figures().items()}
    for logger in _services(loggers):
        if logger.name == "tensorboard" and final:
            logger.log_hyperparams(_flat(config.model_dump(mode="json", exclude_none=True)), final, step)
        else:
            logger.log_metrics(final, step)
        _close(logger)


def _loggers() -> Any:
    return require("lightning.pytorch.loggers", extra="train")


def _open(name: LoggerName, folder: RunFolder, step: int | None) -> Any:
    loggers = _loggers()
    match name:
        case "csv":
            metrics = MetricsFile(folder.metrics)
            if step is not None:
                metrics.go_on_from(step)
            return metrics
        case "tensorboard":
            try:
                return loggers.TensorBoardLogger(folder.path, name="tensorboard", version="", default_hp_metric=False)
            except ModuleNotFoundError:
                _logger.info("no TensorBoard logs: pip install tensorboard")
                return None
        case "wandb":
            require("wandb", extra="loggers")
            return loggers.WandbLogger(name=folder.path.name, save_dir=folder.path)
        case "comet":
            require("comet_ml", extra="loggers")
            return loggers.CometLogger(name=folder.path.name, offline_directory=str(folder.path))
    require("mlflow", extra="loggers")
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.path / 'mlflow.db'}")
    return loggers.MLFlowLogger(run_name=folder.path.name, tracking_uri=uri)


def _close(logger: Any) -> None:
    """Also what Lightning would leave open until the process ends, so that the next stage gets a run of its own."""
    logger.finalize("success")
    if isinstance(logger, _loggers().WandbLogger):
        logger.experiment.finish()
    elif isinstance(logger, _loggers().CometLogger):
        logger.experiment.end()


def _services(loggers: Iterable[Any]) -> list[Any]:
    return [logger for logger in loggers if not isinstance(logger, MetricsFile)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level, with dotted names, as they are written on the command line."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
