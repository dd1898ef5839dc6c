"""The page of a report: every text is shown as text, and lines of all kinds are drawn."""

from html.parser import HTMLParser
from typing import Any

import pytest

from kd_pipeline.report.document import (
    Bar,
    Block,
    Card,
    Chart,
    Charts,
    Code,
    Document,
    Facts,
    Fold,
    Gallery,
    Heading,
    Matrix,
    Picture,
    Section,
    Series,
    Shares,
    Table,
    Text,
    Tile,
)
from kd_pipeline.report.html import render

EVIL = "<script>alert(1)</script>\"' onerror='x' \u202e\x1b[2J {{ 7*7 }}"
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def document(*blocks: Block, text: str = "x") -> Document:
    return Document(text, [text], text, "good", [Card(text, text)], [Section(text, blocks, "a")], text, [(text, text)])


def every_block(text: str) -> list[Block]:
    """A block of each kind in which every text is `text`."""
    return [
        Text(text),
        Heading(text),
        Facts([(text, text)]),
        Table([text], [[text]], title=text),
        Charts([Chart(text, [Series(text, [(0, 1), (1, 2)], 0, last=text)])]),
        Shares([Bar(text, [(text, 0.5)])]),
        Picture(PIXEL, text),
        Gallery(text, text, [Tile(PIXEL, [(text, text, "right")], text)]),
        Matrix(text, [text, text], [[1, 2], [3, 4]]),
        Fold(text, [Code(text)]),
    ]


class Page(HTMLParser):
    """The tags of a page, the names of all attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_text_is_text() -> None:
    page = render(document(*every_block(EVIL), text=EVIL))
    hostile, plain = Page(page), Page(render(document(*every_block("x"))))
    assert hostile.tags == plain.tags and hostile.attributes == plain.attributes
    assert "script" not in hostile.tags and not any(name.startswith("on") for name in hostile.attributes)
    assert hostile.text.count("<script>alert(1)</script>") > 20 and "49" not in hostile.text
    assert "\x1b" not in page and "\u202e" not in page and "\\u202e\\x1b[2J" in hostile.text


def test_browsers_may_load_and_run_nothing() -> None:
    page = render(document(*every_block("x")))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert "http:" not in page and "https:" not in page and "url(" not in page


def drawn(*series: Any, **options: Any) -> str:
    lines = [Series(str(number), points, number) for number, points in enumerate(series)]
    return render(document(Charts([Chart("c", lines, **options)])))


@pytest.mark.parametrize(
    "points",
    [
        [(5.0, 1.0)],
        [(0.0, 2.0), (9.0, 2.0)],
        [(0.0, -1e308), (1.0, 0.5), (2.0, 1e308)],
        [(0.0, 1e-320), (1.0, 2e-320)],
        [(float(x), x % 7) for x in range(100_000)],
        [],
    ],
)
def test_every_finite_line_is_drawn(points: list[tuple[float, float]]) -> None:
    page = drawn(points)
    assert page.count('class="line ') == bool(points)
    assert "nan" not in page and "inf" not in page and len(page) < 40_000


def test_axes_have_round_numbers() -> None:
    page = drawn([(0.0, 0.31), (109.0, 0.901)], in_percent=True)
    assert all(f">{label}</span>" in page for label in ("20%", "40%", "60%", "80%", "100%", "50", "100"))


def test_first_losses_do_not_flatten_the_rest() -> None:
    usual = [(float(step), 1 + step**-0.5) for step in range(1, 60)]
    assert "higher values are cut off" not in drawn(usual)
    assert "higher values are cut off" not in drawn(usual, [(0.0, 90.0), (59.0, 80.0)])
    page = drawn([(0.0, 400.0), *usual])
    assert "higher values are cut off" in page and ">400</span>" not in page and ">1.5</span>" in page
