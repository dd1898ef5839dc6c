"""Where a run logs: `metrics.csv`, and Lightning's loggers by name, which also get the settings."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from kd_pipeline._core.current_student import current_student
from kd_pipeline._core.optional import require
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.metrics_csv import MetricsFile
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.settings import LoggerName

__all__ = ["log_results", "log_settings", "open_loggers"]

_logger = logging.getLogger("kd_pipeline")
_loggers = require("lightning.pytorch.loggers", extra="train")


def open_loggers(names: Collection[LoggerName], folder: RunFolder, step: int | None) -> list[Any]:
    """Loggers for a `Trainer`.

    Args:
        names: which ones; `tensorboard` is skipped, with a log line, if it is not installed.
        folder: where their files go. To log to a service, directory or server instead, set the environment variables
            of the package: `WANDB_MODE`, `COMET_API_KEY`, `MLFLOW_TRACKING_URI` and so on.
        step: the step that the run resumes from, for `metrics.csv`.

    Raises:
        MissingPackageError: a logger other than `tensorboard` is not installed.
    """
    return [logger for name in dict.fromkeys(names) if (logger := _open(name, folder, step)) is not None]


def log_settings(loggers: Iterable[Any], config: BaseModel) -> None:
    """Log all settings under dotted names, secrets hidden; `metrics.csv` needs none, as `config.yaml` is beside it."""
    settings = _flatten(shown_settings(config, exclude_none=True))
    for logger in _services(loggers):
        if logger.name == "tensorboard":
            # Without a metric, hyperparameters never reach its event file; `log_results` logs them with one.
            text = "".join(f"    {name}: {value}\n" for name, value in settings.items())
            logger.experiment.add_text("config", text)
        else:
            logger.log_hyperparams(settings)


def log_results(
    loggers: Iterable[Any],
    config: BaseModel,
    results: Mapping[str, Evaluation],
    step: int,
    *,
    keep_open: Collection[Any] = (),
) -> None:
    """Log the metrics of the exported network on each split, such as `final/val/top1`, and close the loggers.

    Those in `keep_open` are the user's, who may log more.
    """
    final = {
        f"final/{split}/{name}": value for split, each in results.items() for name, value in each.scalars().items()
    }
    for logger in _services(loggers):
        if logger.name == "tensorboard" and final:
            logger.log_hyperparams(_flatten(shown_settings(config, exclude_none=True)), final, step)
        else:
            logger.log_metrics(final, step)
        if any(logger is each for each in keep_open):
            logger.save()
        else:
            _close(logger)


def _open(name: LoggerName, folder: RunFolder, step: int | None) -> Any:
    match name:
        case "csv":
            metrics = MetricsFile(folder.metrics)
            if step is not None:
                metrics.resume(step)
            return metrics
        case "tensorboard":
            try:
                return _loggers.TensorBoardLogger(folder.path, name="tensorboard", version="", default_hp_metric=False)
            except ModuleNotFoundError:
                _logger.info("TensorBoard is not installed, not logging to it: pip install tensorboard")
                return None
        case "wandb":
            require("wandb", extra="loggers")
            # Without it, the second of several students would log into the run of the first.
            several: dict[str, Any] = {"reinit": "create_new"} if current_student() is not None else {}
            return _loggers.WandbLogger(name=_run_name(folder), save_dir=folder.path, **several)
        case "comet":
            require("comet_ml", extra="loggers")
            return _loggers.CometLogger(name=_run_name(folder), offline_directory=str(folder.path))
    require("mlflow", extra="loggers")
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.path / 'mlflow.db'}")
    return _loggers.MLFlowLogger(run_name=_run_name(folder), tracking_uri=uri)


def _run_name(folder: RunFolder) -> str:
    """What services call the run; of several students the run of all is named too."""
    return folder.path.name if current_student() is None else "/".join(folder.path.parts[-2:])


def _close(logger: Any) -> None:
    """Also end what Lightning leaves open until the process exits, so the next stage gets a run of its own."""
    logger.finalize("success")
    if isinstance(logger, _loggers.WandbLogger):
        logger.experiment.finish()
    elif isinstance(logger, _loggers.CometLogger):
        logger.experiment.end()


def _services(loggers: Iterable[Any]) -> list[Any]:
    return [logger for logger in loggers if not isinstance(logger, MetricsFile)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level with dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
