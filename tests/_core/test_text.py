import pytest

from kd_pipeline._core.text import plural, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07cat", "\\x1b]0;owned\\x07cat"),
        ("cat\nroof 99.9 %", "cat\\nroof 99.9 %"),
        ("cat\rdog\x85\u2028", "cat\\rdog\\x85\\u2028"),
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
        ("\udcff.png", "\\udcff.png"),
        ("Katze, 猫, кот, قط, 👩‍🚀, a\u00a0b", "Katze, 猫, кот, قط, 👩‍🚀, a\u00a0b"),
    ],
)
def test_only_what_moves_or_reorders_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


def test_newlines_of_a_message_stay() -> None:
    assert printable("two\nlines\x1b[2J", keep="\n") == "two\nlines\\x1b[2J"


def test_nouns_follow_their_number() -> None:
    assert [plural(2, noun) for noun in ("epoch", "batch", "loss", "image")] == [
        "epochs",
        "batches",
        "losses",
        "images",
    ]
    assert plural(1, "batch") == "batch" and plural(0, "epoch") == "epochs"
