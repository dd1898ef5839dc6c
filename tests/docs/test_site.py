"""What the site must have; `make docs` builds it, executes the notebooks and checks every link within it."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import kd_pipeline
from kd_pipeline import errors, losses, models

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_REFERRED_TO = {"__version__", "losses"}


def described() -> set[str]:
    """Full names in the reference of Python, those of whole modules too."""
    found = {f"kd_pipeline.losses.{name}" for name in losses.__all__}
    found |= {f"kd_pipeline.errors.{name}" for name in errors.__all__}
    for page in (ROOT / "docs").rglob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            if directive == "currentmodule":
                module = name
            found.add(name if name.startswith("kd_pipeline") else f"{module}.{name}")
    assert {"kd_pipeline.losses", "kd_pipeline.errors"} <= found
    return found


def test_every_public_name_is_in_the_reference() -> None:
    names = {f"kd_pipeline.{name}" for name in kd_pipeline.__all__ if name not in NOT_REFERRED_TO}
    names |= {f"kd_pipeline.models.{name}" for name in models.__all__ if name not in kd_pipeline.__all__}
    assert names <= described()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_addresses_are_of_https_and_whole(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    for address in re.findall(r"\bhttps?:[^\s)>\]]*", text):
        parts = urlsplit(address)
        assert parts.scheme == "https", address
        assert re.fullmatch(r"[\w.-]+\.[a-z]{2,}", parts.netloc), address
