"""What a report on runs is made of: sections of blocks, all of plain values, which `html` turns into a page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

__all__ = [
    "Bar",
    "Block",
    "Card",
    "Chart",
    "Charts",
    "Code",
    "Document",
    "Facts",
    "Fold",
    "Gallery",
    "Heading",
    "Matrix",
    "Picture",
    "Section",
    "Series",
    "Shares",
    "Table",
    "Text",
    "Tile",
]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True, slots=True)
class Heading:
    """A title within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Names with a value each."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under titles, which scroll within their own box."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1
    """Columns from the left that hold text; the others hold numbers and are aligned on the right."""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """Finite `(x, y)`, by ascending x."""
    color: int
    """Number of its color."""
    dashed: bool = False
    last: str = ""
    """Its last value as people read it."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the steps of a training."""

    title: str
    series: Sequence[Series]
    in_percent: bool = False


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts side by side."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of `Shares`."""

    name: str
    parts: Sequence[tuple[str, float]]
    """Names and shares from 0 to 1, in the same order in every bar."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Stacked bars of shares, each as long as the page is wide."""

    kind: ClassVar[str] = "shares"
    bars: Sequence[Bar]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, which is in the page itself."""

    kind: ClassVar[str] = "picture"
    uri: str
    """A `data:` URI."""
    caption: str


@dataclass(frozen=True, slots=True)
class Tile:
    """A sample: a small picture, or none, and what is known about it."""

    uri: str | None
    lines: Sequence[tuple[str, str, str]]
    """Who says so, what, and whether it is `right`, `wrong` or neither."""
    name: str
    is_tiny: bool = False
    """Whether it has few pixels, which are shown as such."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Samples side by side."""

    kind: ClassVar[str] = "gallery"
    title: str
    note: str
    tiles: Sequence[Tile]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A confusion matrix of few classes: rows are labels, columns predictions."""

    kind: ClassVar[str] = "matrix"
    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]
    in_percent: bool = False
    """Whether it shows shares of the label, as counts of pixels are large."""


@dataclass(frozen=True, slots=True)
class Code:
    """Text as it stands in a file."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that are shown on a click on their title."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: "Sequence[Block]"


Block = Text | Heading | Facts | Table | Charts | Shares | Picture | Gallery | Matrix | Code | Fold


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report with its title."""

    title: str
    blocks: Sequence[Block]
    anchor: str = ""
    """Letters and hyphens."""


@dataclass(frozen=True, slots=True)
class Card:
    """A number of the head."""

    value: str
    name: str


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    title: str
    summary: Sequence[str]
    """Sentences of the head."""
    status: str
    """How the run has ended, in a few words; empty for several runs."""
    tone: Literal["good", "open", "bad"]
    """How to show the status."""
    cards: Sequence[Card]
    sections: Sequence[Section]
    footer: str = ""
    facts: Sequence[tuple[str, str]] = field(default=())
