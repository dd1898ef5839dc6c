import pytest

from kd_pipeline._core.suggestions import first_few, suggest

NAMES = ["resnet18", "resnet34", "vit"]


@pytest.mark.parametrize(
    ("word", "known", "rest"),
    [
        ("resnet19", NAMES, "; did you mean 'resnet18' or 'resnet34'?"),
        ("zzz", NAMES, "; there are 'resnet18', 'resnet34', 'vit'"),
        ("zzz", iter("abcdefghijkl"), "; there are 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j' and 2 more"),
        ("zzz", [], "; there are none"),
    ],
)
def test_suggest(word, known, rest):
    assert suggest(word, known) == rest


def test_suggest_otherwise():
    assert suggest("zzz", NAMES, otherwise="read the list") == "; read the list"
    assert suggest("zzz", NAMES, otherwise="") == ""
    assert suggest("vitt", NAMES, otherwise="read the list") == "; did you mean 'vit'?"


@pytest.mark.parametrize(
    ("names", "count", "text"),
    [(["a"], None, "a"), (["a", "b"], 2, "a, b"), (["a", "b"], 5, "a, b and 3 more"), ([], None, "")],
)
def test_first_few(names, count, text):
    assert first_few(names, count) == text
    assert first_few([*"abcdefghijkl"]) == "a, b, c, d, e, f, g, h, i, j and 2 more"
