"""Imports of optional packages, none of which may report to its maker that it is used."""

import importlib
import os
import sys
from types import ModuleType
from typing import cast

from kd_pipeline._core.lazy import postpone_import
from kd_pipeline.errors import MissingPackageError

__all__ = ["require", "switch_off_reports"]

_REPORTS_OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime 1.29 and later, which else writes a device ID when it is imported
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # what timm would add to its downloads
    "WANDB_ERROR_REPORTING": "false",
    "COMET_ERROR_TRACKING_ENABLE": "false",
}
"""What the packages document to switch their reports off; a variable that the user has set stays."""
_WITH_TORCHMETRICS = ("lightning", "torchmetrics")
"""Packages that import torchmetrics."""
_OPENVINO_REPORTER = "openvino_telemetry"


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which `pip install 'kd_pipeline[extra]'` installs, with its reports to its maker switched off.

    Raises:
        MissingPackageError: it cannot be imported; the message holds the `pip install` line.
    """
    switch_off_reports()
    try:
        if module.partition(".")[0] in _WITH_TORCHMETRICS:
            # torchmetrics imports them for metrics that are hardly ever used: of speech, with half of SciPy, and of
            # text. Both take about a second.
            with (
                postpone_import("scipy.signal", attributes=["hamming"]),
                postpone_import("transformers", attributes=["AutoModel", "AutoTokenizer"]),
            ):
                return importlib.import_module(module)
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingPackageError(
            f"{module} is needed here and could not be imported ({exc}); pip install 'kd_pipeline[{extra}]'"
        ) from exc


def switch_off_reports() -> None:
    """Let no optional package tell its maker that it is imported or used; for packages imported after this call."""
    for name, value in _REPORTS_OFF.items():
        os.environ.setdefault(name, value)
    if "openvino" not in sys.modules:
        # OpenVINO sends an event from a forked process whenever it is imported, and its only opt-out is a file in the
        # home folder. It does without the package that sends, also in parts that are imported later: with None here,
        # Python finds that package missing.
        sys.modules[_OPENVINO_REPORTER] = cast(ModuleType, None)
