"""The page about commands: usage, options and examples of each."""

import argparse
import re

from kd_pipeline import cli
from kd_pipeline.cli.arguments import CommandParser, add_common
from reference.markdown import wrapped

INTRO = """\
# Every command and option

`kd-pipeline COMMAND --help` prints the same. The exit status is 0, 1 after an error, which is one line on stderr, 2 for
arguments that do not parse, and 130 after Ctrl-C. Overrides such as `train.epochs=20` change [keys of the
config](config.md). Every command also has these options:
"""


def command_page() -> str:
    """The page about commands."""
    parser = cli._parser()
    parts = [INTRO, *(option_entry(action) for action in common_actions())]
    for name, command in subcommands(parser):
        parts.append(f"\n## `{name}`\n")
        parts.append(wrapped(command.description or "") + "\n")
        nested = subcommands(command)
        for each, subject in nested:
            parts.append(f"\n### `{each}`\n")
            parts.append(wrapped(subject.description or "") + "\n")
            parts.append(command_body(each, subject))
        if not nested:
            parts.append(command_body(name, command))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    """The commands of a parser, by their full names."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [(f"{parser.prog} {name}", command) for action in found for name, command in action.choices.items()]


def common_actions() -> list[argparse.Action]:
    """The options of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    add_common(parser)
    return parser._actions


def command_body(name: str, parser: argparse.ArgumentParser) -> str:
    """Usage, options and examples of a command."""
    if isinstance(parser, CommandParser) and parser._add_options is not None:
        parser._add_options(parser)
        parser._add_options = None
    common = {option for action in common_actions() for option in action.option_strings} | {"-h"}
    parts, positional = [], []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not common & {*action.option_strings}]
        if actions and group.title not in ("positional arguments", "options"):
            parts.append(f"\n{wrapped(f'{group.title[:1].upper()}{group.title[1:]}:')}\n")
        parts += [option_entry(action) for action in actions]
        positional += [metavar(action) for action in actions if not action.option_strings]
    usage = f"```text\n{' '.join([name, *required(parser), '[options]', *positional])}\n```\n"
    epilog = f"\n```text\n{parser.epilog.strip()}\n```\n" if parser.epilog else ""
    return "\n".join([usage, *parts]) + "\n" + epilog


def required(parser: argparse.ArgumentParser) -> list[str]:
    """The options that a command cannot do without."""
    alone = [[action] for action in parser._actions if action.required and action.option_strings]
    groups = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    choices = [" | ".join(f"{each.option_strings[0]} {metavar(each)}".strip() for each in group) for group in groups]
    return [f"{action.option_strings[0]} {metavar(action)}" for (action,) in alone] + [f"({each})" for each in choices]


def metavar(action: argparse.Action) -> str:
    """What stands for the value of an option or argument."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.choices is not None and action.metavar is None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = action.metavar or action.dest.upper()
    match action.nargs:
        case "?":
            return f"[{name}]"
        case "*":
            return f"[{name} ...]"
        case "+":
            return f"{name} [{name} ...]"
        case int(number):
            return " ".join([name] * number)
    return name


def option_entry(action: argparse.Action) -> str:
    """One option or argument."""
    value = metavar(action)
    names = [f"**`{name} {value}`**".replace(" `", "`") for name in action.option_strings] or [f"**`{value}`**"]
    text = argparse.HelpFormatter("")._expand_help(action) if action.help else ""
    default = action.default
    if default not in (None, False, argparse.SUPPRESS) and default != [] and "default" not in text:
        text += f" (default: {default})"
    return wrapped(f"- {', '.join(names)}: {text.removesuffix('.')}.", hanging="  ")
