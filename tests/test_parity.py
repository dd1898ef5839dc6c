"""docs/parity.md counts itself rightly, and what it calls done has tests that exist."""

import re
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "parity.md").read_text(encoding="utf-8")
FEATURES, WEAKNESSES = TEXT.split("\n## What went wrong elsewhere\n")


def cells(line: str) -> list[str]:
    """Those of a line of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def states() -> dict[str, list[tuple[int, str]]]:
    """Number and state of each feature, by section."""
    return {
        title: [(int(row[0]), row[4]) for row in map(cells, body.splitlines()) if len(row) == 5 and row[0].isdigit()]
        for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", FEATURES, flags=re.DOTALL | re.MULTILINE)
    }


def kind(state: str) -> str:
    """`yes`, `partly`, `left out` or `not yet`."""
    return re.split(r":", state)[0]


ALL = [row for rows in states().values() for row in rows]


def test_there_are_144_features_with_a_state() -> None:
    assert [number for number, _ in ALL] == list(range(1, 145))
    assert {kind(state) for _, state in ALL} <= {"yes", "partly", "left out", "not yet"}


@pytest.mark.parametrize(("number", "state"), [row for row in ALL if kind(row[1]) != "yes"])
def test_what_is_missing_has_a_reason(number: int, state: str) -> None:
    assert kind(state) == "not yet" or len(state.partition(": ")[2]) >= 5, number


def test_counts_are_those_of_the_rows() -> None:
    table = {
        row[0]: [int(cell) for cell in row[1:]]
        for row in map(cells, TEXT.split("\n## ")[0].splitlines())
        if len(row) == 4 and row[1].isdigit()
    }
    for title, rows in [*states().items(), ("all", ALL)]:
        counts = Counter(kind(state) for _, state in rows)
        assert table[title] == [counts["yes"], counts["partly"], counts["left out"] + counts["not yet"]], title
    counts = Counter(kind(state) for _, state in ALL)
    yes, partly, rest = table["all"]
    assert f"**{yes} yes, {partly} partly, {rest} left out**" in TEXT
    assert counts["not yet"] == 0 or re.search(rf"\({counts['not yet']} of these (is|are) `not yet`", TEXT)


def test_most_features_are_here() -> None:
    counts = Counter(kind(state) for _, state in ALL)
    assert counts["yes"] >= 115 and counts["left out"] <= 15
    assert not re.search(r"not in CI|CI lacks", TEXT)


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", TEXT)
    assert len(named) > 150
    for path, function in named:
        found = REPOSITORY / path
        assert found.exists(), path
        if function:
            assert f"def {function}(" in found.read_text(encoding="utf-8"), f"{path}::{function}"


def test_every_done_feature_names_a_test() -> None:
    rows = [cells(line) for line in FEATURES.splitlines() if re.match(r"\| \d+ \|", line)]
    assert not [row[0] for row in rows if row[4] == "yes" and "`tests/" not in row[3]]
