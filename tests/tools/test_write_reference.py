"""The pages of the reference have every key and every option, as they are now."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kd_pipeline.config.schema import config_schema

ROOT = Path(__file__).parents[2]
ADVICE = "run `python tools/write_reference.py` and commit docs/reference/"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        yield importlib.import_module("write_reference")


def committed(name: str) -> str:
    return (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")


def test_page_of_configs_is_that_of_the_settings(tool: ModuleType) -> None:
    assert committed("config.md") == tool.ConfigReference().page(), ADVICE


def test_page_of_commands_is_that_of_the_parsers(tool: ModuleType) -> None:
    assert committed("commands.md") == tool.command_page(), ADVICE


def test_every_key_of_the_schema_has_a_default_and_a_meaning() -> None:
    entries = dict(re.findall(r"^- \*\*`(\S+)`\*\*: (.*(?:\n  .*)+)", committed("config.md"), flags=re.MULTILINE))
    described = {key.rpartition(".")[2] for key in entries}
    schema = config_schema()
    assert entries.keys() >= schema["properties"].keys()
    for model in schema["$defs"].values():
        assert model["properties"].keys() <= described, model["title"]
    for key, text in entries.items():
        type_and_default, meaning = text.split("\\\n")
        assert meaning.strip(), key
        assert re.search(r"Default:\s+`|Default: its defaults|Default: none|Required\.|^`\w+`\.$", type_and_default), (
            key
        )


def test_every_option_has_a_meaning() -> None:
    entries = re.findall(r"^- (\*\*`.*(?:\n  .*)*)", committed("commands.md"), flags=re.MULTILINE)
    assert len(entries) > 100
    for entry in entries:
        assert entry.rpartition("`**:")[2].strip(" ."), entry
