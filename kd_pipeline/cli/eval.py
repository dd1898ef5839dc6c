"""`kd-pipeline eval`."""

import argparse
import json
import time
from typing import Any

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline.cli.arguments import add_permissions, checked, path_option, permissions, print_progress, size_option
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline eval -c my.yaml                     (the teacher of the config)
  kd-pipeline eval -c my.yaml runs/mine           (the run, its teacher, and how far they agree)
  kd-pipeline eval -c my.yaml --teacher teacher.pt  (other weights of the config's teacher)
  kd-pipeline eval -c my.yaml --split test student.onnx runs/mine --teacher teacher.engine --metric CohenKappa
  kd-pipeline eval -c my.yaml runs/mine --sizes 192 224 288 --crops 0.875 1
  kd-pipeline eval -c my.yaml --bank train runs/backbone timm:resnet18.a1_in1k torchvision:resnet18=weights.pt
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "eval",
        parents=[common],
        help="compare accuracy, agreement, latency and size of runs, ONNX files, engines, backbones and the config's "
        "teacher",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", "--config", type=path_option, required=True, metavar="FILE", help="describes data and teacher"
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=path_option,
        metavar="MODEL",
        help="folder of a run, ONNX file, engine, or checkpoint of the config's student or teacher; or a network "
        "without its head, timm:NAME or torchvision:NAME, with its pretrained weights or, as timm:NAME=FILE, weights "
        "of a file",
    )
    parser.add_argument("--split", default="val", help="split to evaluate on (default: val)")
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher",
        type=path_option,
        metavar="MODEL",
        help="model to measure agreement with, which has the first row, such as a checkpoint of the config's "
        "teacher.model (default: the config's teacher)",
    )
    teacher.add_argument("--no-teacher", action="store_true", help="leave out the config's teacher")
    parser.add_argument(
        "--bank",
        metavar="SPLIT",
        help="labeled split with the neighbors for models without logits, which are judged by k-NN and a linear "
        "classifier (default: the split itself, every fifth of whose images is classified by the rest)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size_option,
        default=[],
        metavar="N or HxW",
        help="height and width of the images, a row for each, all made of one decoding (default: that of the split)",
    )
    parser.add_argument(
        "--crops",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="fractions of the resized image that the center crop leaves, such as 0.875 1, a row for each with each "
        "size (default: that of the split)",
    )
    parser.add_argument(
        "--random", action="store_true", help="give networks by name random weights instead of pretrained ones"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="further metric: a torchmetrics class, or package.module:function",
    )
    add_permissions(parser, "factories and metrics")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override of the config")
    parser.add_argument("--out", type=path_option, metavar="FILE", help="write all metrics as JSON")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config
    from kd_pipeline.evaluation._metrics import MetricSettings
    from kd_pipeline.workflows._compare import compare_files

    started = time.monotonic()
    if parsed.out is not None:
        prepare_output(parsed.out)
    found = compare_files(
        load_config(parsed.config, parsed.set),
        parsed.models,
        split=parsed.split,
        teacher=parsed.teacher or (None if parsed.no_teacher else "config"),
        bank=parsed.bank,
        sizes=parsed.sizes,
        crops=parsed.crops,
        pretrained=not parsed.random,
        metrics=[checked(MetricSettings, {"name": "metric"}, name=name) for name in parsed.metric],
        **permissions(parsed),
        report=print_progress,
    )
    print_result(found.table())
    if parsed.out is not None:
        evaluations = {row.name: row.evaluation.to_dict() for row in found.rows}
        write_output(parsed.out, json.dumps(evaluations, indent=2) + "\n")
        print_progress(f"all metrics: {parsed.out}")
    print_progress(f"evaluated in {time.monotonic() - started:.1f} s")
    return 0
