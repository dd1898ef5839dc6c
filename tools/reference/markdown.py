"""Text of a page in lines of 120 characters."""

import re
import textwrap

WIDTH = 120


def wrapped(text: str, first: str = "", hanging: str = "") -> str:
    """Paragraphs in lines, which do not break within code and links."""
    return "\n\n".join(
        textwrap.fill(
            re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`", lambda match: match[0].replace(" ", "\0"), " ".join(part.split())),
            WIDTH,
            initial_indent=first,
            subsequent_indent=hanging,
            break_long_words=False,
            break_on_hyphens=False,
        ).replace("\0", " ")
        for part in text.split("\n\n")
    )
