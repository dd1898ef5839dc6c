"""Write docs/reference/config.md and commands.md: every key of a config, and every option of a command.

    python tools/write_reference.py

They are read from the settings and the parsers themselves, and a test compares the pages with these.
"""

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_pipeline import cli
from kd_pipeline._core.settings import Settings
from kd_pipeline.cli.arguments import CommandParser, add_common
from kd_pipeline.config.config import Config
from kd_pipeline.config.schema import config_schema
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
SECTIONS = ("data", "student", "teacher", "distill", "train", "probe", "feature_probe", "students")
"""Keys with sections of their own, in the order of the page: settings are described where they first occur."""
WIDTH = 120

CONFIG_INTRO = """\
# Every key of a config

A config is a YAML file for `kd-pipeline` and `kd_pipeline.load_config`. Keys are written here with dots, as overrides
are on the command line: `data.batch_size=128`. A key that does not exist is an error. `kd-pipeline config -c my.yaml`
prints the config of a run with all its defaults, and `kd-pipeline config --schema` a JSON schema for editors, of which
this page has the same texts. `<name>` stands for a name of your choice, and `<n>` for a position in a list, from 0 on.
"""


COMMANDS_INTRO = """\
# Every command and option

`kd-pipeline COMMAND --help` prints the same. The exit status is 0, 1 after an error, which is one line on stderr, 2 for
arguments that do not parse, and 130 after Ctrl-C. Overrides such as `train.epochs=20` change [keys of the
config](config.md). Every command also has these options:
"""


@dataclass
class Section:
    """A model of settings at the key where it is described."""

    model: type[Settings]
    key: str
    which: str
    """What tells it from other models at the same key, such as `kind: tar`."""
    is_of_parent: bool = False
    """`which` is what tells the settings around it from others."""
    also_at: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The heading."""
        return f"`{self.key}`" + (f" {'of' if self.is_of_parent else 'with'} {self.which}" if self.which else "")

    @property
    def level(self) -> int:
        """Of the heading."""
        return min(1 + sum(not part.startswith("<") for part in self.key.split(".")), 4)

    @property
    def link(self) -> str:
        """To the heading, as GitHub and the site name it."""
        return "#" + re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")


class ConfigReference:
    """The page about configs.

    Types, bounds and defaults are those of the JSON schema, meanings those of the docstrings.
    """

    def __init__(self) -> None:
        schema = Config.model_json_schema()
        self._schemas = schema["$defs"] | {Config.__name__: schema}
        self._models = {Config.__name__: Config}
        self.sections: dict[type[Settings], Section] = {}
        self._collect_models(Config)
        for name in SECTIONS:
            self._collect(Config, name, name)

    def page(self) -> str:
        """The text of the page."""
        parts = [CONFIG_INTRO, self._extends(), *(self._entry(Config, name, name) for name in Config.model_fields)]
        for section in self.sections.values():
            base = self._documented_base(section.model)
            names = self._own(section.model, base)
            parts += ["\n" + "#" * section.level + f" {section.title}\n", first_paragraphs(section.model) + "\n"]
            parts.append(wrapped(self._whereabouts(section)) + "\n")
            if base is not None:
                parts.append(wrapped(f"All keys of [{base.title}]({base.link}){', and:' if names else '.'}") + "\n")
            parts += [self._entry(section.model, name, f"{section.key}.{name}") for name in names]
        return "\n".join(parts).replace("\n\n\n", "\n\n").rstrip() + "\n"

    def _whereabouts(self, section: Section) -> str:
        """Other keys with the same settings, and their name in Python."""
        also = f"The same keys: {', '.join(f'`{key}`' for key in section.also_at)}. " if section.also_at else ""
        return f"{also}In Python: `{section.model.__name__}`."

    def _collect_models(self, model: type[Settings]) -> None:
        for info in model.model_fields.values():
            for found in models_in(info.annotation):
                if found.__name__ not in self._models:
                    self._models[found.__name__] = found
                    self._collect_models(found)
                assert self._models[found.__name__] is found, f"two settings are called {found.__name__}"

    def _collect(self, parent: type[Settings], name: str, key: str, inherited: str = "") -> None:
        """Sections for the models of a field, and for the fields of these."""
        node = self._node(parent, name)
        found = [(self._models[ref], place) for ref, place in refs_in(node, key)]
        for model, place in found:
            others = [other for other, at in found if at == place]
            own = self._which(model) if len(others) > 1 else ""
            if model in self.sections:
                section = self.sections[model]
                if place not in (section.key, *section.also_at):
                    section.also_at.append(place)
                continue
            self.sections[model] = Section(model, place, own or inherited, is_of_parent=not own)
            for child in self._own(model, self._documented_base(model)):
                self._collect(model, child, f"{place}.{child}", own if child == "masks" else "")

    def _node(self, model: type[Settings], name: str) -> dict[str, Any]:
        node: dict[str, Any] = self._schemas[model.__name__]["properties"][name]
        return node

    def _which(self, model: type[Settings]) -> str:
        """What a file has that selects this model among others."""
        if model is EnsembleSettings:
            return "a list of `members`"
        if model is TeacherGroupSettings:
            return "`members` by name"
        for name in model.model_fields:
            if (value := self._node(model, name).get("const")) is not None:
                return f"`{name}: {value}`"
        required = self._schemas[model.__name__].get("required")
        return f"`{required[0]}`" if required else ""

    def _documented_base(self, model: type[Settings]) -> Section | None:
        return next((self.sections[base] for base in model.__mro__[1:] if base in self.sections), None)

    def _own(self, model: type[Settings], base: Section | None) -> list[str]:
        """The fields that the base does not describe, what selects the model first."""
        names = [name for name in model.model_fields if base is None or name not in base.model.model_fields]
        return sorted(names, key=lambda name: "const" not in self._node(model, name))

    def _entry(self, model: type[Settings], name: str, key: str) -> str:
        node, meaning = self._node(model, name), " ".join(model.docstring_of(name).split())
        if "const" in node:
            return entry(key, f"{self._words(node)}.", meaning or "Selects these keys.")
        assert meaning, f"{model.__name__}.{name} has no docstring, which this page needs"
        if model.model_fields[name].default is None:
            node = without_null(node)
        return entry(key, f"{self._words(node)}. {self._default(model, name)}", meaning)

    def _extends(self) -> str:
        text = config_schema()["properties"]["extends"]["description"]
        return entry("extends", "a path or a list of paths. Default: none.", text)

    def _default(self, model: type[Settings], name: str) -> str:
        info = model.model_fields[name]
        if info.is_required():
            return "Required."
        value = info.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            own = value.model_dump(mode="json", exclude_unset=True)
            return f"Default: `{plain(own)}`." if own else "Default: its defaults."
        if value is None:
            return "Default: `null`."
        node = self._node(model, name)
        return f"Default: `{plain(node.get('default', value))}`."

    def _words(self, node: dict[str, Any]) -> str:
        """The type of a value in words."""
        match node:
            case {"$ref": ref}:
                section = self.sections[self._models[ref.rpartition("/")[2]]]
                own = "" if section.is_of_parent else section.which
                return f"[{own or 'these keys'}]({section.link})"
            case {"anyOf": _} | {"oneOf": _}:
                return one_of([*dict.fromkeys(words for option in flat(node) for words in self._alternatives(option))])
            case {"const": value}:
                return f"`{plain(value)}`"
            case {"enum": _}:
                return one_of(self._alternatives(node))
            case {"prefixItems": items}:
                words = [self._words(item) for item in items]
                if len({*words}) == 1:
                    return f"a list of {len(words)}, each {words[0]}"
                return f"a list: {', then '.join(words)}"
            case {"type": "array"}:
                filled = f" of at least {node['minItems']}" if node.get("minItems") else ""
                return f"a list{filled}, each {self._words(node['items'])}"
            case {"type": "object"}:
                return f"a mapping of names to {self._words(node['additionalProperties'])}"
            case {"type": "integer" | "number" as kind}:
                return ("a whole number" if kind == "integer" else "a number") + bounds(node)
            case {"type": "string", "pattern": r"^\w+(\.\w+)*:\w+$"}:
                return "text, as `package.module:function`"
        return WORDS[node.get("format", node.get("type"))]

    def _alternatives(self, node: dict[str, Any]) -> list[str]:
        """The words for each of several choices, or for the only one."""
        match node:
            case {"enum": values}:
                return [f"`{plain(value)}`" for value in values]
            case {"type": "boolean"}:
                return ["`true`", "`false`"]
        return [self._words(node)]


WORDS = {"string": "text", "path": "a path", "boolean": "`true` or `false`", "null": "`null`", None: "anything"}


def flat(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a union, and of unions in it."""
    options = node.get("anyOf") or node.get("oneOf")
    return [choice for option in options for choice in flat(option)] if options else [node]


def without_null(node: dict[str, Any]) -> dict[str, Any]:
    """A union without null, which the default says."""
    options = [option for option in flat(node) if option.get("type") != "null"]
    return options[0] if len(options) == 1 else {"anyOf": options}


def bounds(node: dict[str, Any]) -> str:
    """The limits of a number."""
    low, high = node.get("minimum"), node.get("maximum")
    if node["type"] == "integer" and "exclusiveMinimum" in node:
        low = node["exclusiveMinimum"] + 1
    if low is not None and high is not None:
        return f" from {plain(low)} to {plain(high)}"
    found = [f"at least {plain(low)}"] if low is not None else []
    if low is None and "exclusiveMinimum" in node:
        found.append(f"above {plain(node['exclusiveMinimum'])}")
    if "exclusiveMaximum" in node:
        found.append(f"below {plain(node['exclusiveMaximum'])}")
    return f", {' and '.join(found)}" if found else ""


def one_of(words: list[str]) -> str:
    """`a, b or c`, with semicolons where a part has commas."""
    comma = ";" if any("," in each for each in words) else ","
    if len(words) < 3 and comma == ",":
        return " or ".join(words)
    return f"{comma} ".join(words[:-1]) + (f"{comma} or " if comma == ";" else " or ") + words[-1]


def plain(value: Any) -> str:
    """A value as a config has it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if value > 2**53 and value.bit_count() == 1:
            return f"2^{value.bit_length() - 1}"
        case float():
            return repr(value) if len(repr(value)) < 9 else f"{value:.4g}"
        case dict():
            return "{" + ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(plain, value)) + "]"
    return str(value)


def refs_in(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Models that a value may be made of, and where each would be."""
    match node:
        case {"$ref": ref}:
            yield ref.rpartition("/")[2], key
        case {"anyOf": options} | {"oneOf": options}:
            for option in options:
                yield from refs_in(option, key)
        case {"type": "array", "items": items}:
            yield from refs_in(items, f"{key}.<n>")
        case {"type": "object", "additionalProperties": values}:
            yield from refs_in(values, f"{key}.<name>")


def models_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings in a type."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)


def first_paragraphs(model: type[Settings]) -> str:
    """The docstring without its sections for Python."""
    text = inspect.getdoc(model) or ""
    return wrapped(re.split(r"\n\n(?:Args|Attributes|Raises|Returns):\n", text)[0])


def entry(key: str, type_and_default: str, meaning: str) -> str:
    """One key."""
    return wrapped(f"- **`{key}`**: {type_and_default}", hanging="  ") + "\\\n" + wrapped(meaning, "  ", "  ")


def wrapped(text: str, first: str = "", hanging: str = "") -> str:
    """Paragraphs in lines, which do not break within code and links."""
    return "\n\n".join(
        textwrap.fill(
            re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`", lambda match: match[0].replace(" ", "\0"), " ".join(part.split())),
            WIDTH,
            initial_indent=first,
            subsequent_indent=hanging,
            break_long_words=False,
            break_on_hyphens=False,
        ).replace("\0", " ")
        for part in text.split("\n\n")
    )


def command_page() -> str:
    """The page about commands."""
    parser = cli._parser()
    parts = [COMMANDS_INTRO, *(option_entry(action) for action in common_actions())]
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


def main() -> None:
    """Write the pages."""
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "config.md").write_text(ConfigReference().page(), encoding="utf-8")
    (REFERENCE / "commands.md").write_text(command_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
