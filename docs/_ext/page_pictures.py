"""Pictures that the build draws, where a page has `<!-- picture NAME: what it shows -->`, a comment on GitHub."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SCRIPT = Path(__file__).resolve().parent.parent / "pictures.py"
SECONDS = 600
"""They take half a minute on two free cores."""


def draw(app: Sphinx) -> None:
    """Draw all pictures with docs/pictures.py, unless that was done since it was changed."""
    stamp = folder(app) / "drawn"
    if not app.config.draw_pictures or (stamp.exists() and stamp.stat().st_mtime > SCRIPT.stat().st_mtime):
        return
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, str(SCRIPT), str(folder(app))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise ExtensionError(f"docs/pictures.py failed:\n{done.stderr}")
    stamp.touch()


def folder(app: Sphinx) -> Path:
    """Where the pictures are."""
    return Path(app.doctreedir).parent / "pictures"


def insert(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the pictures into a page."""
    where = os.path.relpath(folder(app), Path(app.env.doc2path(docname)).parent)

    def markdown(match: re.Match[str]) -> str:
        name, words = match.groups()
        if not (folder(app) / name).exists():
            if app.config.draw_pictures:
                raise ExtensionError(f"{docname}: docs/pictures.py draws no {name}")
            return ""
        return f"![{' '.join(words.split())}]({where}/{name})"

    source[0] = re.sub(r"<!-- picture ([\w.]+): (.*?) -->", markdown, source[0], flags=re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("draw_pictures", True, "env", bool)
    app.connect("builder-inited", draw)
    app.connect("source-read", insert)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
