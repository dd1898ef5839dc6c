"""The types and values of JSON schemas in words."""

from collections.abc import Callable
from typing import Any

Link = Callable[[str], str]
"""Returns what leads to the description of the settings with this name."""

WORDS = {"string": "text", "path": "a path", "boolean": "`true` or `false`", "null": "`null`", None: "anything"}


def words_of(node: dict[str, Any], link: Link) -> str:
    """The type of a value in words, from its JSON schema; `link` leads to where the model of that name is described."""
    match node:
        case {"$ref": ref}:
            return link(ref.rpartition("/")[2])
        case {"anyOf": _} | {"oneOf": _}:
            return one_of([*dict.fromkeys(words for option in flat(node) for words in alternatives(option, link))])
        case {"const": value}:
            return f"`{plain(value)}`"
        case {"enum": _}:
            return one_of(alternatives(node, link))
        case {"prefixItems": items}:
            words = [words_of(item, link) for item in items]
            if len({*words}) == 1:
                return f"a list of {len(words)}, each {words[0]}"
            return f"a list: {', then '.join(words)}"
        case {"type": "array"}:
            filled = f" of at least {node['minItems']}" if node.get("minItems") else ""
            return f"a list{filled}, each {words_of(node['items'], link)}"
        case {"type": "object"}:
            return f"a mapping of names to {words_of(node['additionalProperties'], link)}"
        case {"type": "integer" | "number" as kind}:
            return ("a whole number" if kind == "integer" else "a number") + bounds(node)
        case {"type": "string", "pattern": r"^\w+(\.\w+)*:\w+$"}:
            return "text, as `package.module:function`"
    return WORDS[node.get("format", node.get("type"))]


def alternatives(node: dict[str, Any], link: Link) -> list[str]:
    """The words for each of several choices, or for the only one."""
    match node:
        case {"enum": values}:
            return [f"`{plain(value)}`" for value in values]
        case {"type": "boolean"}:
            return ["`true`", "`false`"]
    return [words_of(node, link)]


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
