"""The card says what a recording is, and never a license that nobody named."""

import json
from pathlib import Path

import pytest
import yaml

from kd_pipeline.teachers.recorded.join import join_recording, verify_recording
from tests.recordings import GOOD, small_recording


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_recording(tmp_path / "recording")


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_card_says_what_is_recorded(folder: Path) -> None:
    join_recording(folder, 1)
    text = card(folder)
    assert "40 in each of 1 epoch" in text and "800 bytes in 2 parts, 20 for an image" in text
    assert "pytorch in fp32, fingerprint `f`, 3 classes" in text
    blocks = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert yaml.safe_load(blocks[0]) == {"logits": {"shape": [3], "dtype": "float32"}}
    assert yaml.safe_load(blocks[1]) == json.loads(json.dumps(GOOD["stream"]))
    assert verify_recording(folder) == 2


def test_license_is_the_one_that_was_named(folder: Path) -> None:
    join_recording(folder, 1)
    assert "license:" not in card(folder) and "Nobody has named a license" in card(folder)
    join_recording(folder, 1, license="CC-BY-4.0")
    front = yaml.safe_load(card(folder).split("---\n")[1])
    assert front["license"] == "CC-BY-4.0" and "Nobody" not in card(folder)
    named = card(folder)
    join_recording(folder, 1)
    assert card(folder) == named


def test_card_of_the_user_is_kept(folder: Path) -> None:
    (folder / "README.md").write_text("my own words")
    join_recording(folder, 1)
    assert card(folder) == "my own words"
