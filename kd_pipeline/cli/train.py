"""`kd-pipeline train`."""

import argparse
from typing import Any

from kd_pipeline.cli.arguments import add_config

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline train -c configs/digits_all_stages.yaml stage=all
  kd-pipeline train -c configs/digits_all_stages.yaml stage=baseline train.epochs=20
  torchrun --nproc-per-node 4 -m kd_pipeline train -c configs/imagenet_resnet34_to_resnet18.yaml

The same command goes on where an earlier one was stopped; another run_dir starts anew.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "train",
        parents=[common],
        help="train a teacher, a student alone, or a student with its teacher, from a config",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, plugins="factories and losses")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config
    from kd_pipeline.workflows._train import train

    outcome = train(load_config(parsed.config, parsed.overrides), plugins=parsed.plugin)
    for name, figures in outcome.figures.items():
        found = {"top-1": figures.top1, "top-5": figures.top5, "F1": figures.macro_f1, "agreement": figures.agreement}
        known = ", ".join(f"{word} {value:.1%}" for word, value in found.items() if value is not None)
        print(f"{outcome.stage} on {name} ({figures.num_samples} images): {known}")
    print(f"all of it: {outcome.folder}")
    return 0
