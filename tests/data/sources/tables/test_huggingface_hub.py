"""A dataset by its name on the Hub is downloaded once, from a server in this process that answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from kd_pipeline.data.sources import ImageFolder
from tests.data.sources.table_files import contents

datasets = pytest.importorskip("datasets")

NAME, COMMIT = "me/flowers", "a" * 40
SCRIPT = f"""
import hashlib, json, sys
import numpy as np
from kd_pipeline.data.sources import HuggingFace
source = HuggingFace({NAME!r}, revision=sys.argv[1])
images = [hashlib.sha256(bytes(image)).hexdigest() for image in source.read(np.arange(len(source)))]
print(json.dumps([images, source.labels.tolist(), list(source.classes)]))
"""


class Hub(BaseHTTPRequestHandler):
    """One dataset, at one commit."""

    files: ClassVar[dict[str, bytes]] = {}
    downloads: ClassVar[list[str]] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}"):
            folder = path.removeprefix(f"/api/datasets/{NAME}/tree/{COMMIT}").strip("/")
            self.send(200, json.dumps(self.entries(folder)).encode())
        elif path.startswith(f"/api/datasets/{NAME}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.send(200, json.dumps({"id": NAME, "sha": COMMIT, "tags": [], "siblings": siblings}).encode())
        else:
            _, found, rest = path.partition(f"/datasets/{NAME}/resolve/")
            revision, _, name = rest.partition("/")
            if found and revision in ("main", COMMIT) and name in self.files:
                etag = hashlib.sha1(self.files[name]).hexdigest()
                self.send(200, self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                if self.command == "GET":
                    self.downloads.append(name)
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})

    def entries(self, folder: str) -> list[dict[str, object]]:
        inside = [name for name in self.files if os.path.dirname(name) == folder]
        below = {os.path.dirname(name) for name in self.files} - {folder, ""} if not folder else set()
        files = [
            {
                "type": "file",
                "path": name,
                "size": len(self.files[name]),
                "oid": hashlib.sha1(name.encode()).hexdigest(),
            }
            for name in inside
        ]
        return files + [{"type": "directory", "path": name, "oid": "b" * 40} for name in sorted(below)]

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_name_on_the_hub_is_downloaded_once(photo_folder: Path, hub: str, tmp_path: Path) -> None:
    files = ImageFolder(photo_folder)
    images = [{"bytes": image, "path": None} for image in contents(files)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(files.classes)))
    columns = {"image": images, "label": files.labels.tolist()}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    parquet = "data/train-00000-of-00001.parquet"
    Hub.files = {"README.md": b"---\nlicense: mit\n---\n", parquet: (tmp_path / "train.parquet").read_bytes()}
    Hub.downloads.clear()
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, COMMIT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        digests = [hashlib.sha256(image).hexdigest() for image in contents(files)]
        assert json.loads(done.stdout) == [digests, files.labels.tolist(), list(files.classes)]
    assert Hub.downloads.count(parquet) == 1
