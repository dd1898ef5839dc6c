"""`kd-pipeline distill`."""

import argparse
from typing import Any

from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import add_permissions, path_option, permissions
from kd_pipeline.cli.printing import print_result

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline distill --teacher timm:vit_small_patch16_dinov3 --student timm:resnet18 --data photos
  kd-pipeline distill --teacher timm:vit_small_patch16_dinov3 --teacher-weights dinov3.safetensors \\
      --student torchvision:resnet50 --data photos --labeled flowers --epochs 300 data.batch_size=256
  kd-pipeline distill --teacher onnx:teacher.onnx --student factory:mine.nets:tiny --plugin mine.nets --data photos

Names are timm:NAME, torchvision:NAME, builtin:NAME and factory:PACKAGE.MODULE:FUNCTION, and onnx:FILE for a teacher.
The student has no head and starts from random weights; student.pretrained=true starts from its library's own.
Run the same command to resume, or train with config.yaml of the run folder, which has every setting in it.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "distill",
        parents=[common],
        help="train a backbone to have the features of a pretrained one, without labels or a config file",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, metavar="NAME", help="whose features are learned")
    parser.add_argument("--student", required=True, metavar="NAME", help="the network that learns them")
    parser.add_argument(
        "--data", required=True, type=path_option, metavar="DIR", help="folder with images at any depth, without labels"
    )
    parser.add_argument(
        "--labeled",
        type=path_option,
        metavar="DIR",
        help="folder with a folder of images for each class, or with train and val of such folders: how well a k-NN "
        "and a linear probe classify the features, which also chooses the best student",
    )
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="length of the run (default: 100)")
    parser.add_argument("--out", type=path_option, metavar="DIR", help="run folder (default: runs/TEACHER_to_STUDENT)")
    parser.add_argument(
        "--teacher-weights",
        type=path_option,
        metavar="FILE",
        help="checkpoint of the teacher; defaults to its library's pretrained weights",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start from the beginning, and move the earlier run to earlier/1 in its folder, or the next number",
    )
    add_permissions(parser, "factories")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of a config, which come last")


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.workflows._distill import distill

    result = distill(
        parsed.teacher,
        parsed.student,
        parsed.data,
        labeled=parsed.labeled,
        epochs=parsed.epochs,
        out=parsed.out,
        teacher_weights=parsed.teacher_weights,
        overrides=parsed.overrides,
        **permissions(parsed),
        fresh=parsed.fresh,
        report=lambda line: print_result(printable(line)),
    )
    if is_rank_zero():
        print_result(printable(f"run folder: {result.folder}"))
    return 0
