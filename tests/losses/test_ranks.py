"""Two processes on gloo learn what one learns: queue and statistics too."""

import pytest
import torch

from tests.forks import fork_ranks
from tests.losses import rank_worker


@pytest.mark.slow
def test_two_ranks_match_one(tmp_path):
    fork_ranks(rank_worker.train_rank, (str(tmp_path),))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = rank_worker.train([(slice(None), sum(sizes)) for sizes in rank_worker.SIZES])
    assert first.keys() == second.keys() == alone.keys()
    for name, expected in alone.items():
        if name.startswith(("queues", "standardizers")):
            assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert alone["queues.0.is_filled"].all()
