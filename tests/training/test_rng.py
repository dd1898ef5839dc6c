"""Random generators resume where they were."""

import random

import numpy as np
import torch

from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kd_pipeline.training.rng import RngState, capture_rng, restore_rng


def draw() -> list[float]:
    # An odd number of Gaussians: the generators draw them in pairs and keep the second.
    return [
        random.random(),
        random.gauss(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def test_generators_resume_from_file(tmp_path):
    draw()
    save_checkpoint({"state_dict": {}, "rng": capture_rng()}, tmp_path / "a.ckpt")
    expected = [draw() for _ in range(3)]
    restore_rng(load_checkpoint(tmp_path / "a.ckpt")["rng"])
    assert [draw() for _ in range(3)] == expected


def test_capture_draws_nothing():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    capture_rng()
    capture_rng()
    found = draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    assert draw() == found


def test_run_on_the_cpu_makes_no_cuda_context(monkeypatch):
    def initialize():
        raise AssertionError("makes a context")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", initialize)
    assert capture_rng()[0]["cuda"] is None


def test_different_number_of_ranks_is_warned(caplog):
    states = capture_rng() * 2
    draw()
    before = torch.get_rng_state()
    restore_rng(states)
    assert torch.equal(torch.get_rng_state(), before)
    assert "saved on 2 ranks, resumed on 1" in caplog.text


def test_state_goes_back_to_its_own_gpu(monkeypatch):
    """Whichever is the current one by then."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    current = 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: states[current])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    captured = RngState.capture()
    states, current = {0: torch.tensor([20]), 1: torch.tensor([21])}, 0
    captured.restore()
    assert states == {0: torch.tensor([20]), 1: torch.tensor([11])}
