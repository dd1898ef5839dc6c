from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import FolderServer, serve_folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    """A web server of `tmp_path / "served"`."""
    (tmp_path / "served").mkdir()
    with serve_folder(tmp_path / "served") as server:
        yield server
