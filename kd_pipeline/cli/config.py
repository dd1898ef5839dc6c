"""`kd-pipeline config`."""

import argparse
import json
from pathlib import Path
from typing import Any

from kd_pipeline._core.output import prepare_output, write_output
from kd_pipeline.cli.arguments import path_option
from kd_pipeline.cli.printing import print_result
from kd_pipeline.errors import ConfigError

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline config -c my.yaml                      every setting that a run would have, also those of extended files
  kd-pipeline config -c my.yaml distill.loss=dkd
  kd-pipeline config --schema --out schema.json      keys, types and explanations for an editor

An editor with the YAML language server reads the schema if the first line of the config is
  # yaml-language-server: $schema=schema.json
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "config",
        parents=[common],
        help="print a config with every default, and with what it extends and the overrides, or the schema of configs",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("-c", "--config", type=path_option, metavar="FILE", help="the YAML file")
    shown.add_argument("--schema", action="store_true", help="print the JSON schema of config files instead")
    parser.add_argument(
        "--out", type=path_option, metavar="PATH", help="write to this file instead of printing; it is replaced"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the file")


def _run(parsed: argparse.Namespace) -> int:
    if parsed.schema and parsed.overrides:
        raise ConfigError(f"--schema is that of every config; leave out {' '.join(parsed.overrides)}")
    out: Path | None = parsed.out
    if out is not None:
        prepare_output(out, kind="file")
    text = _schema() if parsed.schema else _resolved(parsed)
    if out is None:
        print_result(text.rstrip())
    else:
        write_output(out, text)
    return 0


def _schema() -> str:
    from kd_pipeline.config.schema import config_schema

    return json.dumps(config_schema(), indent=2) + "\n"


def _resolved(parsed: argparse.Namespace) -> str:
    import yaml

    from kd_pipeline.config.config import load_config
    from kd_pipeline.training.environment import shown_settings

    settings = shown_settings(load_config(parsed.config, parsed.overrides))
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text
