"""`kd-pipeline init`."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from kd_pipeline._core.text import printable
from kd_pipeline.cli.arguments import path_option
from kd_pipeline.cli.printing import print_result
from kd_pipeline.errors import ConfigError

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  kd-pipeline init photos                 photos/train/<class>/... and photos/val/<class>/..., or photos/<class>/...
  kd-pipeline init photos -o birds.yaml
  kd-pipeline init shards                 shards/train*.tar and shards/val*.tar, or shards/*.tar

Nothing is asked, and no file is replaced. The comments in the file say what can be changed.
"""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to `commands`."""
    commands.add_parser(
        "init",
        parents=[common],
        help="write a config with comments for a folder of images or tar shards",
        epilog=_EXAMPLES,
        add_options=_add_options,
        run=_run,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=path_option,
        metavar="FOLDER",
        help="of images or tar shards; without it the paths are examples",
    )
    parser.add_argument(
        "-o", "--out", type=path_option, default=Path("my.yaml"), metavar="PATH", help="the file to write"
    )


def _run(parsed: argparse.Namespace) -> int:
    from kd_pipeline.config.starter import starter_config

    out: Path = parsed.out
    _check_is_new(out)
    text = starter_config(parsed.folder, name=out.stem)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _check_is_new(out)
    except OSError as exc:
        raise ConfigError(f"{out} cannot be written: {exc.strerror}; choose another with -o") from None
    name = shlex.quote(str(out))
    print_result(printable(f"written: {out}"))
    print_result(printable(f"next:    kd-pipeline check -c {name}"))
    print_result(printable(f"then:    kd-pipeline train -c {name}"))
    return 0


def _check_is_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists, and init replaces no file; choose another name with -o, or remove it first")
