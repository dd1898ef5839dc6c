"""The result of a stage, and the lines that show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._features import COSINE
from kd_pipeline.workflows.stage import Stage

__all__ = ["TrainResult"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The outcome of a stage."""

    stage: Stage
    folder: Path
    evaluations: Mapping[str, Evaluation]
    """Of the exported network, by validation split, and `test` if there is one."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The metrics of the network, and of its teacher, as `kd-pipeline train` prints them."""
        lines = []
        for split, found in self.evaluations.items():
            if metrics := _metrics_line(found):
                lines.append(f"{self.stage} on {split} ({found.num_samples} images): {metrics}")
            if (
                found.teacher is not None
                and (metrics := _metrics_line(found.teacher))
                and found.teacher.top1 is not None
            ):
                lines.append(f"teacher on {split}: {metrics}")
        return tuple(lines)


def _metrics_line(found: Evaluation) -> str:
    metrics = {"top-1": found.top1, "top-5": found.top5, "F1": found.macro_f1, "agreement": found.agreement}
    parts = [f"{name} {value:.1%}" for name, value in metrics.items() if value is not None]
    if found.top1 is None and found.loss is not None:
        parts.append(f"loss {found.loss:.4g}")
    prefix = f"{COSINE}."
    cosines = {name.removeprefix(prefix): value for name, value in found.metrics.items() if name.startswith(prefix)}
    if cosines:
        parts.append(f"cosine to the teacher {', '.join(f'{name} {value:.3f}' for name, value in cosines.items())}")
    for metric, title in (("knn_top1", "k-NN"), ("linear_top1", "linear")):
        if metric in found.metrics:
            teachers = [name.removesuffix(f"_{metric}") for name in found.metrics if name.endswith(f"_{metric}")]
            others = ", ".join(f"{name} {found.metrics[f'{name}_{metric}']:.1%}" for name in teachers)
            parts.append(f"{title} {found.metrics[metric]:.1%}{f' ({others})' if others else ''}")
    return ", ".join(parts)
