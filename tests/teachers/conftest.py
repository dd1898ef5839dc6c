"""A fake GPU that runs late, for the teachers that run on one."""

from collections.abc import Iterator

import pytest

from tests.teachers.fake_gpu import Gpu, install


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    install(gpu, monkeypatch)
    yield gpu
    assert all(builder._is_closed for builder in gpu.builders)
