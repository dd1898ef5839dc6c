"""A fake GPU that runs late, for the teachers that run on one."""

import sys
from collections.abc import Iterator

import pytest
import torch

from tests.teachers.fake_gpu import CUDAGraph, Gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "device", gpu.device)
    monkeypatch.setattr(torch.cuda, "current_stream", gpu.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    monkeypatch.setattr(torch.cuda, "Stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: CUDAGraph(gpu))
    monkeypatch.setattr(torch.cuda, "graph", gpu.capture)
    monkeypatch.setitem(sys.modules, "cuda.core", gpu.core)
    yield gpu
    assert all(builder._is_closed for builder in gpu.builders)
