"""Signatures as the source code has them, code in single backticks, and names that are linked where they are described.

Docstrings have Google's sections, which napoleon reads. What is between single backticks is code, and a link if it is a
name in the reference.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from kd_pipeline._core.settings import Settings
from kd_pipeline.config import Config

_COLON = "\N{RATIO}"
_WORDS = ("check", "compare", "distill", "evaluate", "predict", "record", "train")
"""Functions, and also commands, splits and keys: only with `()` a function is meant."""


def code_role(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None, content: Any = ()
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """The role of single backticks in docstrings: code, and a link to what it names if that is in the reference."""
    code = text.replace("\0", "\\")
    literal = nodes.literal(rawtext, code, classes=["xref", "py"])
    name = code.removesuffix("()")
    if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name) is None or code in _WORDS:
        return [literal], []
    env = inliner.document.settings.env
    reference = addnodes.pending_xref(
        rawtext,
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=name,
        refdoc=env.current_document.docname,
        is_code=True,
    )
    reference["py:module"] = env.ref_context.get("py:module")
    reference["py:class"] = env.ref_context.get("py:class")
    return [reference], []


def keep_plain(app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Code, and types of other libraries, stay what they are where they are no names of this reference."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target.startswith("kd_pipeline."):
        return content if exists(target) else None
    domain = env.domains.python_domain
    names = [name for name in domain.objects if name.endswith(f".{target}") and name.startswith("kd_pipeline.")]
    if f"kd_pipeline.{target}" in names:
        names = [f"kd_pipeline.{target}"]
    if len({domain.objects[name].node_id for name in names}) == 1 and (target[0].isupper() or names[0].count(".") == 1):
        found = domain.objects[names[0]]
        return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, names[0])
    return content


def exists(name: str) -> bool:
    """Whether a full name can be imported."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(import_module(module), attribute)
    except ImportError:
        return bool(module) and exists(module)


def source_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Types and defaults as they are written, and of settings the names and defaults of the fields."""
    if what == "exception":
        return ("", None) if arguments else None
    if what == "class" and inspect.isclass(obj):
        if issubclass(obj, BaseModel):
            return settings_signature(obj), None
        if inspect.isabstract(obj):
            return "", None
        definition = None if "__init__" not in vars(obj) else definition_of(obj.__init__)
    else:
        definition = definition_of(obj)
    if definition is None:
        return None
    found = definition.args
    is_bound = what in ("class", "method") and not any(
        isinstance(each, ast.Name) and each.id == "staticmethod" for each in definition.decorator_list
    )
    positional = found.posonlyargs or found.args
    if is_bound and positional:
        positional.pop(0)
        if not found.posonlyargs and len(found.defaults) > len(found.args):
            found.defaults.pop(0)
    result = None if what == "class" or definition.returns is None else unquoted(ast.unparse(definition.returns))
    return f"({unquoted(ast.unparse(found))})", result


def unquoted(text: str) -> str:
    """Without the quotes around names of classes that are defined later."""
    return re.sub(r"'([A-Z]\w*)'", r"\1", text)


def definition_of(function: Any) -> ast.FunctionDef | None:
    """The code of a function."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return definition if isinstance(definition, ast.FunctionDef) else None


def settings_signature(model: type[BaseModel]) -> str:
    """The fields by name, with their defaults."""
    fields = []
    for name, info in model.model_fields.items():
        if info.is_required():
            fields.append(name)
            continue
        value = info.get_default(call_default_factory=True)
        fields.append(f"{name}={type(value).__name__}()" if isinstance(value, BaseModel) else f"{name}={value!r}")
    return f"(*, {', '.join(fields)})" if fields else "()"


def readable_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make an indented block after a blank line one of code, as it is in Markdown; of settings, say where the keys are.

    What napoleon would take for a type is hidden from it until `restored_docstring`.
    """
    if lines and lines[0].startswith("Create a new model by parsing"):  # pydantic's own
        lines.clear()
        return
    if what in ("attribute", "property"):
        lines[0:1] = [line.replace(":", _COLON) for line in lines[0:1]]
    if inspect.isclass(obj) and issubclass(obj, Settings):
        if key := keys_of_settings(app).get(obj.__name__):
            title = key.replace("<", r"\<")
            lines += ["", f"Its fields are the keys of :ref:`{title} <keys-{obj.__name__.lower()}>`.", ""]
        elif obj is not Config:
            fields = (f"    {name}: {' '.join(obj.docstring_of(name).split())}" for name in obj.model_fields)
            lines += ["", "Args:", *fields, ""]
    text = re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", "\n".join(lines))
    lines[:] = with_code_blocks(text.split("\n"))


def restored_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """With what was hidden from napoleon."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def keys_of_settings(app: Sphinx) -> dict[str, str]:
    """Where a config has the fields of a class, which the page of configs describes."""
    page = (Path(app.srcdir) / "reference" / "config.md").read_text(encoding="utf-8")
    return {name: key for key, name in re.findall(r"^#+ `([^`]+)`.*\n(?:(?!#).*\n)*?.*In Python: `(\w+)`", page, re.M)}


def label_keys(app: Sphinx, document: nodes.document) -> None:
    """Labels for the settings on the page of configs, and anchors for keys."""
    env = app.env
    if env.current_document.docname != "reference/config":
        return
    for paragraph in document.findall(nodes.paragraph):
        if match := re.search(r"In Python: (\w+)\.$", paragraph.astext()):
            label, section = f"keys-{match[1].lower()}", paragraph.parent
            env.domains.standard_domain.labels[label] = (env.current_document.docname, section["ids"][0], match[1])
            env.domains.standard_domain.anonlabels[label] = (env.current_document.docname, section["ids"][0])
    for item in document.findall(nodes.list_item):
        if (key := next(item.findall(nodes.literal), None)) is not None and key.astext() not in document.ids:
            item["ids"].append(key.astext())
            document.ids[key.astext()] = item


def with_code_blocks(lines: Iterable[str]) -> list[str]:
    """The lines, with `::` before each block of code."""
    found: list[str] = []
    in_block = False
    for line in lines:
        if line.startswith("├") and "::" not in found:  # a tree, whose first line is its root
            found[-1:] = ["::", "", f"    {found[-1]}"]
        if line.startswith(("├", "│", "└")):
            found.append(f"    {line}")
            continue
        is_indented = line.startswith("    ")
        if line.strip() and not is_indented:
            in_block = False
        elif is_indented and not in_block and found and not found[-1].strip():
            before = next((each for each in reversed(found) if each.strip()), "")
            if not before.startswith((" ", "- ", "* ")) and not re.match(r"\d+\. ", before):
                found += ["::", ""]
                in_block = True
        found.append(line)
    return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_role("docstring_code", code_role)
    app.connect("missing-reference", keep_plain)
    app.connect("doctree-read", label_keys)
    app.connect("autodoc-process-signature", source_signature)
    app.connect("autodoc-process-docstring", readable_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restored_docstring, priority=600)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
