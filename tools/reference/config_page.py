"""The page about configs: every key, with its type, default and meaning."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kd_pipeline._core.settings import Settings
from kd_pipeline.config.config import Config
from kd_pipeline.config.schema import config_schema
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings
from reference.markdown import wrapped
from reference.type_words import plain, without_null, words_of

SECTIONS = ("data", "student", "teacher", "distill", "train", "probe", "feature_probe", "students")
"""Keys with sections of their own, in the order of the page: settings are described where they first occur."""

INTRO = """\
# Every key of a config

A config is a YAML file for `kd-pipeline` and `kd_pipeline.load_config`. Keys are written here with dots, as overrides
are on the command line: `data.batch_size=128`. A key that does not exist is an error. `kd-pipeline config -c my.yaml`
prints the config of a run with all its defaults, and `kd-pipeline config --schema` a JSON schema for editors, of which
this page has the same texts. `<name>` stands for a name of your choice, and `<n>` for a position in a list, from 0 on.
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
        parts = [INTRO, self._extends(), *(self._entry(Config, name, name) for name in Config.model_fields)]
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
            return entry(key, f"{words_of(node, self._link)}.", meaning or "Selects these keys.")
        assert meaning, f"{model.__name__}.{name} has no docstring, which this page needs"
        if model.model_fields[name].default is None:
            node = without_null(node)
        return entry(key, f"{words_of(node, self._link)}. {self._default(model, name)}", meaning)

    def _link(self, name: str) -> str:
        """Markdown that leads to the section of a model."""
        section = self.sections[self._models[name]]
        own = "" if section.is_of_parent else section.which
        return f"[{own or 'these keys'}]({section.link})"

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
