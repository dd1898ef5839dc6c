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

Run the same command to resume an interrupted training; a different run_dir starts from the beginning.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "train",
        parents=[common],
        help="train the teacher of a config, the student alone, or the student with its teacher",
        epilog=_EXAMPLES,
        add_options=lambda parser: add_config(parser, plugins="factories and losses"),
        run=_run,
    )


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.config import load_config

    config = load_config(parsed.config, parsed.overrides)  # an error in it should not wait for Lightning

    from kd_pipeline.workflows._train import train

    result = train(config, plugins=parsed.plugin)
    for split, found in result.evaluations.items():
        metrics = {"top-1": found.top1, "top-5": found.top5, "F1": found.macro_f1, "agreement": found.agreement}
        known = ", ".join(f"{name} {value:.1%}" for name, value in metrics.items() if value is not None)
        print(f"{result.stage} on {split} ({found.num_samples} images): {known}")
    print(f"run folder: {result.folder}")
    return 0
