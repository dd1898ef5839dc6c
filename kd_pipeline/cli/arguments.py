"""Shared by the commands: options from settings and settings from options, lines of progress, the exit status."""

import argparse
import logging
import re
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from kd_pipeline._core.image_size import Size
from kd_pipeline._core.library_output import TerminalHandler, libraries_to_log
from kd_pipeline._core.paths import local_path
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.terminal_log import PrintableFormatter
from kd_pipeline._core.text import printable
from kd_pipeline.cli.printing import print_message
from kd_pipeline.errors import ConfigError, KDPipelineError

__all__ = [
    "CommandParser",
    "add_common",
    "add_config",
    "add_options",
    "add_permissions",
    "checked",
    "given",
    "path_option",
    "permissions",
    "print_progress",
    "run_command",
    "size_option",
]

Model = TypeVar("Model", bound=BaseModel)

_OVERRIDES = "overrides"
"""The argument of the commands that change a config."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, which adds its options when it is used.

    The settings that options are made from import torch. `kd-pipeline --help` and the other commands do without it.

    Args:
        run: runs the command and returns its exit status.
        add_options: adds the options; defaults to none.
        arguments: of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        *,
        run: Callable[[argparse.Namespace], int] | None = None,
        add_options: Callable[[argparse.ArgumentParser], None] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(formatter_class=_HelpFormatter, **arguments)
        self.register("action", "parsers", _Commands)
        self._add_options = add_options
        self._arguments: list[str] = []
        self._late_overrides: list[str] = []
        """Those that stand after an option with several values."""
        if run is not None:
            self.set_defaults(run=run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the options, and parse. A command itself refuses what is left over, with advice."""
        add_options, self._add_options = self._add_options, None
        if add_options is not None:
            add_options(self)
        self._arguments, self._late_overrides = [*(args or ())], []
        parsed, rest = super().parse_known_args(args, namespace)
        if self._late_overrides:
            setattr(parsed, _OVERRIDES, [*getattr(parsed, _OVERRIDES), *self._late_overrides])
        if rest and self.get_default("run") is not None and self._subparsers is None:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._advice(rest)}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit."""
        files = [text for text in self._arguments if text.endswith((".yaml", ".yml")) and "=" not in text]
        if files and "required: -c/--config" in message:
            message += f"; did you mean -c {files[0]}?"
        super().error(printable(message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is no choice, with similar ones."""
        if action.choices is not None and value not in action.choices:
            is_command = isinstance(action, argparse._SubParsersAction)
            what = f"no command {value!r}" if is_command else f"{value!r} is no choice"
            similar = suggest(
                str(value), map(str, action.choices), otherwise=f"choose from {', '.join(action.choices)}"
            )
            if is_command:
                self.error(f"{what}{similar}")
            raise argparse.ArgumentError(action, f"{what}{similar}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The values of an option or argument. An option with several also gets the arguments that follow it."""
        positional = next(iter(self._get_positional_actions()), None)
        is_greedy = bool(action.option_strings) and action.nargs in ("+", "*") and positional is not None
        if is_greedy and positional is not None and positional.dest == _OVERRIDES:
            self._late_overrides += [word for word in arg_strings if "=" in word]
            arg_strings = [word for word in arg_strings if "=" not in word]
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as exc:
            if is_greedy and positional is not None:
                option = action.option_strings[0]
                exc.message += (
                    f"; {option} takes every word up to the next option, so write {positional.metavar} before it"
                )
            raise

    def _advice(self, rest: Sequence[str]) -> str:
        """Options that the first of the arguments that are left over may have meant."""
        word = rest[0].partition("=")[0]
        known = [option for option in self._option_string_actions if option.startswith("--")]
        if word.startswith("-"):
            return suggest(word, known, otherwise=f"options: {', '.join(known)}")
        return "; write all overrides side by side" if "=" in rest[0] else ""


class _Commands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Commands whose own help begins with their line in the list of commands."""

    def add_parser(self, name: str, **arguments: Any) -> Any:
        """A new command."""
        if text := arguments.get("help"):
            arguments.setdefault("description", f"{text[0].upper()}{text[1:]}.")
        return super().add_parser(name, **arguments)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and wraps the description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text.strip():
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_said = action.default in (None, False, argparse.SUPPRESS) or action.default == [] or "default" in text
        return text if is_said else f"{text} (default: %(default)s)"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command, which `run_command` reads."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and what libraries print")
    parser.add_argument("--verbose", action="store_true", help="log what is chosen, and why")


def add_config(parser: argparse.ArgumentParser, *, plugins: str = "factories") -> None:
    """Add `--config`, overrides and the options of `add_permissions`."""
    parser.add_argument("-c", "--config", type=path_option, required=True, metavar="FILE", help="the YAML file")
    add_permissions(parser, plugins)
    parser.add_argument(_OVERRIDES, nargs="*", metavar="key.path=value", help="overrides of the file")


def add_permissions(parser: argparse.ArgumentParser, plugins: str) -> None:
    """Add `--plugin` and `--trust-engine`, which no file can give; `plugins` is what the user's modules provide."""
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help=f"module with {plugins}")
    parser.add_argument(
        "--trust-engine",
        action="append",
        default=[],
        type=_sha256,
        metavar="SHA256",
        help="digest of an engine to load although somebody else could have written it, or it has no manifest",
    )


def permissions(parsed: argparse.Namespace) -> dict[str, list[str]]:
    """The arguments `plugins` and `trust_engines` of workflows, as typed."""
    return {"plugins": parsed.plugin, "trust_engines": parsed.trust_engine}


def path_option(text: str) -> Path:
    """The `type` of an option that is a path, read like the paths in a config.

    Raises:
        argparse.ArgumentTypeError: it is empty or a URL, or has a variable such as `$DATA` in it.
    """
    try:
        return local_path(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def add_options(
    parser: argparse._ActionsContainer,
    model: type[Settings],
    *fields: str,
    prefix: str = "",
    flags: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Add an option for each of the `fields` of `model`, with the field's type, default and docstring.

    Values except paths stay strings for pydantic to convert, and None if not given; `given` collects the others.

    Args:
        parser: the parser, or a group of its options.
        model: the settings.
        fields: names of fields.
        prefix: of the options and of the parsed attributes.
        flags: spellings of an option, by field; defaults to `--` and the name of the field.
    """
    for name in fields:
        field = model.model_fields[name]
        option = f"--{prefix}{name}".replace("_", "-")
        parser.add_argument(
            *(flags or {}).get(name, [option]),
            dest=f"{prefix}{name}",
            help=_help(model, name),
            **_syntax(field.annotation),
        )


def given(parsed: argparse.Namespace, model: type[BaseModel], *, prefix: str = "") -> dict[str, Any]:
    """The fields of `model` that options gave."""
    values = {name: getattr(parsed, f"{prefix}{name}", None) for name in model.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def checked(model: Callable[..., Model], options: Mapping[str, str] | None = None, /, **values: Any) -> Model:
    """`model(**values)`, with errors that name the option.

    Args:
        model: the settings.
        options: the option of a field whose name differs.
        values: the fields as typed.

    Raises:
        ConfigError: what is wrong with which option.
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            if each["type"] == "value_error" and not each["loc"]:
                problems.append(str(each["ctx"]["error"]))
            else:
                field = str(each["loc"][0])
                option = (options or {}).get(field, field.replace("_", "-"))
                text = each["msg"].removeprefix("Value error, ")
                got = "" if each["type"] == "value_error" else f", got {each['input']!r}"
                problems.append(f"--{option}: {text}{got}")
        raise ConfigError("; ".join(problems)) from None


def run_command(run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace, *, prog: str) -> int:
    """The exit status of a command: that of `run`, 1 after an error in one line, or 130 after Ctrl-C.

    What libraries print is kept off the terminal, unless there is `--debug`.
    """
    with nullcontext() if parsed.debug else libraries_to_log():
        return _run_logged(run, parsed, prog)


def _run_logged(run: Callable[[argparse.Namespace], int], parsed: argparse.Namespace, prog: str) -> int:
    handler = logging.StreamHandler() if parsed.debug else TerminalHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, handlers=[handler])
    try:
        return run(parsed)
    except KDPipelineError as error:
        print_message("".join(traceback.format_exception(error)).rstrip() if parsed.debug else f"{prog}: {error}")
        return 1
    except KeyboardInterrupt:
        print_message(f"{prog}: stopped")
        return 130


def print_progress(line: str) -> None:
    """Print a line of progress to stderr; stdout is for the command's result."""
    print_message(line)


def size_option(text: str) -> int | tuple[int, int]:
    """The `type` of an option that is the size of images: `224`, or `384x640` for height and width.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is 224, or 384x640 for height and width, got {text!r}")
    height, width = (int(side) for side in match.groups(default=match[1]))
    return height if height == width else (height, width)


def _number(text: str) -> str:
    """The `type` of an option with several numbers, which pydantic converts.

    Raises:
        argparse.ArgumentTypeError: it is no number.
    """
    try:
        float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    return text


def _sha256(text: str) -> str:
    if re.fullmatch("[0-9a-fA-F]{64}", text) is None:
        raise argparse.ArgumentTypeError(f"a sha256 has 64 hexadecimal digits, got {text!r}")
    return text.lower()


def _help(model: type[Settings], name: str) -> str:
    """The docstring of a field in argparse's style, and its default."""
    field = model.model_fields[name]
    text = " ".join(model.docstring_of(name).replace("`", "").split()).removesuffix(".")
    if text[1:2].islower():
        text = text[0].lower() + text[1:]
    if field.default not in (None, False, (), PydanticUndefined) and "defaults to" not in text:
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{text} (default: {default})".strip()
    return text.replace("%", "%%")


def _syntax(annotation: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a value of this type; of a union, the type that is easiest to type."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    kind = Path if Path in kinds else kinds[0]
    if Size in kinds or annotation == get_args(Size)[0]:  # without its validator where it is the whole annotation
        return {"type": size_option, "metavar": "N or HxW"}
    if kind is bool:
        return {"action": "store_true", "default": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        metavar = _metavar(item)
        return {
            "nargs": "+" if rest == [Ellipsis] else 1 + len(rest),
            "metavar": metavar,
            "type": _number if metavar in _NUMBERS else None,
        }
    return {"metavar": _metavar(kind), **({"type": path_option} if kind is Path else {})}


_NUMBERS = ("N", "X")
"""What stands for a number in the help."""


def _metavar(kind: Any) -> str:
    if get_origin(kind) is not None:  # Annotated
        kind = get_args(kind)[0]
    return {int: "N", float: "X", Path: "PATH", str | Path: "PATH"}.get(kind, "NAME")
