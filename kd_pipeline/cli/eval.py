"""`kd-pipeline eval`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kd_pipeline.cli.arguments import checked

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline eval -c configs/digits_all_stages.yaml runs/digits runs/digits/teacher
  kd-pipeline eval -c my.yaml --split test student.onnx teacher.engine runs/mine --metric CohenKappa
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "eval",
        parents=[common],
        help="accuracy, agreement, latency and size of runs, ONNX files and engines, side by side",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="describes the data")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the folder of a run, an ONNX file or an engine")
    parser.add_argument("--split", default="val", help="which images; val unless given")
    parser.add_argument("--teacher", metavar="MODEL", help="the model that agreement is measured with")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric of torchmetrics as well, or package.module:function",
    )
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="brings factories and metrics")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="a change to the config")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where all figures go as JSON")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from contextlib import ExitStack

    import torch

    from kd_pipeline.config.config import load_config
    from kd_pipeline.data.settings import Untaught
    from kd_pipeline.evaluation._compare import Compared, compare, measure_cost
    from kd_pipeline.evaluation._evaluate import MetricSettings, evaluate, open_metrics
    from kd_pipeline.loader.loader import KDDataLoader
    from kd_pipeline.teachers.open import open_teacher
    from kd_pipeline.teachers.settings import TeacherSettings
    from kd_pipeline.workflows.exported import OpenedModel, open_model_file

    config = load_config(parsed.config, parsed.set)
    options = {"name": "metric"}
    metrics = open_metrics(
        [checked(MetricSettings, options, name=name) for name in parsed.metric], plugins=parsed.plugin
    )
    with ExitStack() as opened:
        loader = opened.enter_context(KDDataLoader.from_config(Untaught(config.seed, config.data), parsed.split))
        size = loader.transform.size
        images: dict[str, Any] = {"device": loader.device, "dtype": getattr(torch, loader.transform.dtype)}

        def open_one(name: str) -> OpenedModel:
            model = open_model_file(Path(name), size=size, classes=loader.classes, plugins=parsed.plugin, **images)
            opened.callback(model.close)
            return model

        reference = None
        if parsed.teacher is not None:
            module = open_one(parsed.teacher).model
            if isinstance(module, torch.nn.Module):
                reference = open_teacher(TeacherSettings(), module=module, image_shape=(3, size, size), **images)
            else:
                reference = module
        rows = []
        for name in parsed.models:
            one = open_one(name)
            print(f"evaluating {name}", file=sys.stderr)
            evaluation = evaluate(one.model, loader, reference=reference, metrics=metrics)
            cost = measure_cost(one.model, next(iter(loader)).images, files=one.files)
            rows.append(Compared(name=name, evaluation=evaluation, cost=cost))
    print(compare(rows))
    for row in rows:
        for metric, value in row.evaluation.metrics.items():
            print(f"{row.name}: {metric} {value}")
    if parsed.out is not None:
        found = {row.name: row.evaluation.to_dict() for row in rows}
        parsed.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0
