"""Of many names a few are listed; an unknown one is answered with what was probably meant."""

import pytest

from kd_pipeline._core.suggestions import some, suggest

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
def test_the_names_most_like_it_are_proposed_or_else_the_first_few(word, known, rest):
    assert suggest(word, known) == rest


def test_where_none_is_like_it_the_caller_may_say_something_else():
    assert suggest("zzz", NAMES, otherwise="read the list") == "; read the list"
    assert suggest("zzz", NAMES, otherwise="") == ""
    assert suggest("vitt", NAMES, otherwise="read the list") == "; did you mean 'vit'?"


@pytest.mark.parametrize(
    ("names", "count", "text"),
    [(["a"], None, "a"), (["a", "b"], 2, "a, b"), (["a", "b"], 5, "a, b and 3 more"), ([], None, "")],
)
def test_names_are_listed_up_to_ten_and_the_rest_is_counted(names, count, text):
    assert some(names, count) == text
    assert some([*"abcdefghijkl"]) == "a, b, c, d, e, f, g, h, i, j and 2 more"
