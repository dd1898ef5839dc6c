"""The files for those who contribute or cite are whole, and name what exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_pipeline import __version__

REPOSITORY = Path(__file__).parent.parent
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
PROSE = [
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    REPOSITORY / "SECURITY.md",
    REPOSITORY / ".github" / "PULL_REQUEST_TEMPLATE.md",
]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_citation_has_what_the_format_requires_and_this_version() -> None:
    citation = read(REPOSITORY / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] and all(author["name"] for author in citation["authors"])
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"


def test_changelog_has_this_version() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## .*\b{re.escape(__version__)}$", changelog, flags=re.MULTILINE)


def test_there_are_forms_for_bugs_questions_and_features() -> None:
    assert [form.stem for form in FORMS] == ["bug", "feature", "question"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_form_is_what_github_takes(form: Path) -> None:
    content = read(form)
    assert content["name"] and content["description"]
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert ids and len(set(ids)) == len(ids)
    for field in content["body"]:
        assert field["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
        assert field["type"] not in ("dropdown", "checkboxes") or field["attributes"]["options"]


def test_a_bug_comes_with_the_doctors_output() -> None:
    (doctor,) = [field for field in read(FORMS[0])["body"] if field.get("id") == "doctor"]
    assert "kd-pipeline doctor" in doctor["attributes"]["label"] and doctor["validations"]["required"]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_named_files_links_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:kd_pipeline|tests|docs|tools|examples|benchmarks)/[\w./-]*)`", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")]
    for path in [*named, *linked]:
        assert (REPOSITORY / path).exists(), path
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_names_that_the_guide_gives_are_in_the_files_that_it_names() -> None:
    guide = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = "".join((REPOSITORY / path).read_text(encoding="utf-8") for path in re.findall(r"`([\w/]+\.py)`", guide))
    for name in re.findall(r"`(_?[A-Z][A-Za-z]*[a-z_]\w*|_[A-Z_]+|[A-Z]{4,}|_\w+)`", guide):
        assert re.search(rf"\b{name}\b", code), name
