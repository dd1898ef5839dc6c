"""After a build, every link within the site leads to a page, and to an anchor that the page has."""

import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

CHECKED = {"a": "href", "img": "src"}


class Links(HTMLParser):
    """What a page links to, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the address and the anchor of an element."""
        found = dict(attrs)
        if anchor := found.get("id"):
            self.anchors.add(anchor)
        if tag in CHECKED and (address := found.get(CHECKED[tag])):
            self.addresses.add(address)


def check(app: Sphinx, exception: Exception | None) -> None:
    """Look up every link of every page.

    Raises:
        ExtensionError: names the links that lead nowhere.
    """
    if exception is not None or app.builder.name != "html":
        return
    pages = {page: Links(page) for page in sorted(Path(app.outdir).rglob("*.html"))}
    broken = []
    for page, links in pages.items():
        for address in sorted(links.addresses):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
            anchor = unquote(parts.fragment)
            has_anchor = not anchor or target not in pages or anchor in pages[target].anchors
            if not target.exists() or not has_anchor:
                broken.append(f"{page.relative_to(app.outdir)}: {address}")
    if broken:
        raise ExtensionError("links that lead nowhere:\n" + "\n".join(broken))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("build-finished", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
