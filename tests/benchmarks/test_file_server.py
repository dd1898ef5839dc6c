import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from benchmarks.file_server import FileServer, serving

CONTENT = bytes(range(256)) * 9000
LATENCY_S = 0.02

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "bucket").mkdir()
    (folder / "bucket/a b.bin").write_bytes(CONTENT)
    (folder / "bucket/empty").touch()
    with serving(folder, latency_s=LATENCY_S) as server:
        yield server


@pytest.fixture
def connection(server: FileServer) -> Iterator[HTTPConnection]:
    connection = HTTPConnection(server.url.removeprefix("http://"))
    yield connection
    connection.close()


def get(connection: HTTPConnection, name: str, asked: str | None = None, method: str = "GET") -> HTTPResponse:
    connection.request(method, f"/bucket/{name}", headers={"Range": f"bytes={asked}"} if asked else {})
    return connection.getresponse()


def test_whole_file(connection: HTTPConnection) -> None:
    response = get(connection, "a%20b.bin")
    assert (response.status, response.read()) == (200, CONTENT)
    assert response.headers["ETag"] == get(connection, "a%20b.bin", method="HEAD").headers["ETag"]


@pytest.mark.parametrize(
    ("asked", "part"),
    [("0-0", slice(0, 1)), ("1000-2000000", slice(1000, 2000001)), ("-7", slice(-7, None)), ("5-", slice(5, None))],
)
def test_range(asked: str, part: slice, connection: HTTPConnection) -> None:
    response = get(connection, "a%20b.bin", asked)
    first, end, _ = part.indices(len(CONTENT))
    assert (response.status, response.read()) == (206, CONTENT[part])
    assert response.headers["Content-Range"] == f"bytes {first}-{end - 1}/{len(CONTENT)}"


def test_head_has_only_the_size(connection: HTTPConnection) -> None:
    response = get(connection, "a%20b.bin", method="HEAD")
    assert (response.headers["Content-Length"], response.read()) == (str(len(CONTENT)), b"")


def test_a_connection_lasts(connection: HTTPConnection) -> None:
    statuses = []
    for name in ("empty", "missing", "", "empty"):
        response = get(connection, name)
        assert response.read() == b""
        statuses.append(response.status)
    assert statuses == [200, 404, 404, 200]


def test_each_answer_takes_the_latency(connection: HTTPConnection, server: FileServer) -> None:
    start_s, cpu_s = time.perf_counter(), server.cpu_s()
    for _ in range(5):
        get(connection, "empty").read()
    assert time.perf_counter() - start_s > 5 * LATENCY_S
    assert 0 <= server.cpu_s() - cpu_s < 5 * LATENCY_S


def test_server_ends_with_the_block(tmp_path: Path) -> None:
    with serving(tmp_path, latency_s=0) as server:
        assert server.cpu_s() >= 0
    with pytest.raises(FileNotFoundError):
        server.cpu_s()
