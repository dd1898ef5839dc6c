"""The JSON schema of a config file, for editors: keys, types, choices and the docstring of every setting."""

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from kd_pipeline._core.settings import Settings
from kd_pipeline.config.compose import EXTENDS, PRESET, preset_names
from kd_pipeline.config.config import Config

__all__ = ["config_schema"]


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file, draft 2020-12.

    No key is required, because a file may extend another one that has it; `kd-pipeline check` says what is missing.
    """
    schema = Config.model_json_schema(schema_generator=_WithDocstrings)
    for node in list(_nodes(schema)):
        node.pop("required", None)
        # What lacks its `kind`, as the other file has it, fits several.
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
            node.pop("discriminator", None)
    file = {"type": "string", "examples": ["base.yaml", *(f"{PRESET}{name}" for name in preset_names())]}
    schema["properties"] = {
        EXTENDS: {
            "description": "File that this one builds on, relative to this file's folder, or a preset; or a list, of "
            "which later entries win.",
            "anyOf": [file, {"type": "array", "items": file}],
        }
    } | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _WithDocstrings(GenerateJsonSchema):
    """Reads the docstrings when a schema is asked for, and not while the settings are imported."""

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().model_schema(schema)
        model: type = schema["cls"]
        if issubclass(model, Settings):
            for name, node in found.get("properties", {}).items():
                if text := " ".join(model.docstring_of(name).replace("`", "").split()):
                    node["description"] = text
        return found


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a schema."""
    match node:
        case dict():
            yield node
            for value in node.values():
                yield from _nodes(value)
        case list():
            for value in node:
                yield from _nodes(value)
