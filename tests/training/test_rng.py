"""Random numbers go on where they were."""

import random

import numpy as np
import torch

from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kd_pipeline.training.rng import capture_rng, restore_rng


def draw() -> list[float]:
    # Odd numbers of Gaussians: the generators keep the second of each pair that they make.
    return [
        random.random(),
        random.gauss(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def test_all_generators_go_on_where_they_were_captured_after_a_trip_through_a_file(tmp_path):
    draw()
    save_checkpoint({"state_dict": {}, "rng": capture_rng()}, tmp_path / "a.ckpt")
    expected = [draw() for _ in range(3)]
    restore_rng(load_checkpoint(tmp_path / "a.ckpt")["rng"])
    assert [draw() for _ in range(3)] == expected


def test_capturing_draws_nothing():
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


def test_states_of_another_number_of_ranks_are_left_aside_with_a_word(caplog):
    states = capture_rng() * 2
    draw()
    before = torch.get_rng_state()
    restore_rng(states)
    assert torch.equal(torch.get_rng_state(), before)
    assert "saved on 2 ranks, resumed on 1" in caplog.text
