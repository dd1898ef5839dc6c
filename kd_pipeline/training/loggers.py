"""Where a run logs: `metrics.csv`, and Lightning's loggers by name, which also get settings, pictures and tables."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial, wraps
from typing import Any
from weakref import WeakSet

from pydantic import BaseModel

from kd_pipeline._core.current_student import current_student
from kd_pipeline._core.optional import require
from kd_pipeline._core.secret_values import hide_in_text
from kd_pipeline._core.text import printable
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.training.environment import shown_settings
from kd_pipeline.training.metrics_csv import MetricsFile
from kd_pipeline.training.result_media import ResultMedia, log_media
from kd_pipeline.training.run_folder import RunFolder
from kd_pipeline.training.settings import LoggerName

__all__ = ["log_results", "log_settings", "open_loggers"]

_logger = logging.getLogger("kd_pipeline")
_loggers = require("lightning.pytorch.loggers", extra="train")
_own_stores: set[str] = set()
"""MLflow's stores in run folders: it sets the variable `MLFLOW_TRACKING_URI` to what it was opened with."""
_failed: WeakSet[Any] = WeakSet()
"""Loggers that have failed, and are left out."""


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
    found = [logger for name in dict.fromkeys(names) if (logger := _open(name, folder, step)) is not None]
    for logger in _services(found):
        _keep_run(logger)
    return found


def log_settings(loggers: Iterable[Any], config: BaseModel, *, run_id: str) -> None:
    """Log the id of the run and all settings under dotted names, secrets hidden.

    `metrics.csv` needs none, as `config.yaml` and `history.jsonl` are beside it.
    """
    settings = {"run_id": run_id, **_flatten(shown_settings(config, exclude_none=True))}
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
    media: ResultMedia | None = None,
    keep_open: Collection[Any] = (),
) -> None:
    """Log the metrics of the exported network on each split, such as `final/val/top1`, and close the loggers.

    A logger that fails is a warning, as the run is done and its folder has all of it.

    Args:
        loggers: all of the run.
        config: of the run.
        results: metrics by split.
        step: after which they were measured.
        media: pictures, confusion matrices and tables.
        keep_open: the user's own loggers, who may log more.
    """
    final = {
        f"final/{split}/{name}": value for split, each in results.items() for name, value in each.scalars().items()
    }
    settings = _flatten(shown_settings(config, exclude_none=True))
    for logger in _services(loggers):
        if logger in _failed:
            continue
        is_open = any(logger is each for each in keep_open)
        try:
            if logger.name == "tensorboard" and final:
                logger.log_hyperparams(settings, final, step)
            else:
                logger.log_metrics(final, step)
            log_media(logger, media or ResultMedia(), step)
            (logger.save if is_open else partial(_close, logger))()
        except Exception as exc:  # a package may raise anything when its server is gone
            _warn(logger, exc, "its results are not complete there")


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
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is not None and uri not in _own_stores:  # the server knows where its artifacts go
        return _loggers.MLFlowLogger(run_name=_run_name(folder), tracking_uri=uri)
    uri = f"sqlite:///{folder.path / 'mlflow.db'}"
    _own_stores.add(uri)
    artifacts = str(folder.path.absolute() / "mlruns")
    return _loggers.MLFlowLogger(run_name=_run_name(folder), tracking_uri=uri, artifact_location=artifacts)


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


def _keep_run(logger: Any) -> None:
    """Let the first failure while metrics are logged or the training ends be a warning, and then leave the logger out.

    A server that is gone would else end a run of hours, or have it wait for each of its metrics.
    """

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if logger in _failed:
                return None
            try:
                return method(*args, **kwargs)
            except Exception as exc:  # a package may raise anything
                _failed.add(logger)
                _warn(logger, exc, "the run goes on without it")
            return None

        return call

    for name in ("log_metrics", "save", "after_save_checkpoint", "finalize"):
        setattr(logger, name, guarded(getattr(logger, name)))


def _warn(logger: Any, exc: Exception, what: str) -> None:
    reason = printable(hide_in_text(f"{type(exc).__name__}: {exc}")).strip()[:500]
    name = type(logger).__name__.removesuffix("Logger")
    _logger.warning("the logger %s failed, and %s; metrics.csv has all metrics: %s", name, what, reason)


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
