"""The JSON schema of configs accepts what the reader accepts, and refuses what an editor should mark."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_pipeline.config.config import Config
from kd_pipeline.config.schema import config_schema

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
PRESETS = sorted((Path(__file__).parents[2] / "kd_pipeline" / "config" / "presets").glob("*.yaml"))
SCHEMA = config_schema()
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip
REMARKS = {"title", "description", "default", "examples", "format", "$schema", "$defs"}


def problems(value: Any, schema: dict[str, Any], key: str = "") -> list[str]:
    """What a validator of JSON schemas says; every keyword in the schema must be known to this one."""
    found = []
    for word, rule in schema.items():
        match word:
            case "$ref":
                found += problems(value, SCHEMA["$defs"][rule.removeprefix("#/$defs/")], key)
            case "type":
                is_bool = isinstance(value, bool) and rule != "boolean"
                if is_bool or not isinstance(value, TYPES[rule]):
                    found.append(f"{key}: no {rule}")
            case "anyOf":
                if all(problems(value, each, key) for each in rule):
                    found.append(f"{key}: fits none of {len(rule)}")
            case "const" | "enum":
                if value not in (rule if word == "enum" else [rule]):
                    found.append(f"{key}: not {rule}")
            case "properties" if isinstance(value, dict):
                for name in rule.keys() & value.keys():
                    found += problems(value[name], rule[name], f"{key}.{name}")
            case "additionalProperties" if isinstance(value, dict):
                for name in value.keys() - schema.get("properties", {}).keys():
                    extra = [f"{key}.{name}: unknown"] if rule is False else []
                    found += extra if isinstance(rule, bool) else problems(value[name], rule, f"{key}.{name}")
            case "items" if isinstance(value, list):
                for number, item in enumerate(value[len(schema.get("prefixItems", [])) :]):
                    found += problems(item, rule, f"{key}.{number}")
            case "prefixItems" if isinstance(value, list):
                for number, (item, each) in enumerate(zip(value, rule, strict=False)):
                    found += problems(item, each, f"{key}.{number}")
            case "minItems" | "maxItems" | "minProperties" if isinstance(value, list | dict):
                if (len(value) < rule) if word.startswith("min") else (len(value) > rule):
                    found.append(f"{key}: {word}")
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" if isinstance(value, int | float):
                wrong = {
                    "minimum": value < rule, "maximum": value > rule,
                    "exclusiveMinimum": value <= rule, "exclusiveMaximum": value >= rule,
                }  # fmt: skip
                found += [f"{key}: {word}"] if wrong[word] else []
            case "pattern" if isinstance(value, str):
                found += [] if re.search(rule, value) else [f"{key}: pattern"]
            case "properties" | "additionalProperties" | "items" | "prefixItems" | "pattern":
                pass  # for values of another type
            case "minItems" | "maxItems" | "minProperties" | "minLength":
                pass
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                pass
            case _:
                assert word in REMARKS, f"the keyword {word} is not checked here"
    return found


def plain(text: str) -> Any:
    return yaml.safe_load(text)


@pytest.mark.parametrize("path", CONFIGS + PRESETS, ids=lambda path: path.stem)
def test_files_of_the_repository_are_accepted(path: Path) -> None:
    assert problems(plain(path.read_text()), SCHEMA) == []


def test_defaults_are_accepted() -> None:
    assert problems(Config(run_dir="run").model_dump(mode="json"), SCHEMA) == []


@pytest.mark.parametrize(
    "text",
    [
        "extends: base.yaml",
        "extends: [base.yaml, preset:distilbert]",
        "data: {train: {source: {root: other}}}",  # its kind is in the other file
        "train: {schedule: {milestones: [1, 2]}}",
        "teacher: {members: {one: {onnx: a.onnx}}}",
    ],
)
def test_part_of_a_config_is_accepted(text: str) -> None:
    assert problems(plain(text), SCHEMA) == []


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 3",
        "train: {epoch: 3}",
        "train: {epochs: 0}",
        "train: {epochs: many}",
        "train: {precision: fp8}",
        "data: {train: {source: {kind: image_folders, root: x}}}",
        "extends: 3",
        "extends: [3]",
        "train: {optimizer: {betas: [0.9]}}",
        "train: {optimizer: {factory: no path}}",
    ],
)
def test_what_an_editor_should_mark(text: str) -> None:
    assert problems(plain(text), SCHEMA)


def test_settings_are_explained() -> None:
    optimizer = SCHEMA["$defs"]["OptimizerSettings"]["properties"]
    assert optimizer["lr"]["description"] == "The peak learning rate of the schedule."
    assert SCHEMA["properties"]["extends"]["description"].startswith("File that this one builds on")
    explained = [
        "description" in node for model in SCHEMA["$defs"].values() for node in model.get("properties", {}).values()
    ]
    assert sum(explained) > 0.7 * len(explained)
