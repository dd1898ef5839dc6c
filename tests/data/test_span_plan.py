"""A plan of spans has the samples and views of the whole epoch at its positions, and no others."""

import numpy as np
import pytest

from kd_pipeline.data.plan import Plan
from kd_pipeline.data.span_plan import SpanPlan

SPANS = {1: [(3, 10), (12, 13)], 3: [(0, 8)]}


@pytest.mark.parametrize("last_batch", ["keep", "pad"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_span_has_the_samples_of_its_positions(last_batch, repeats):
    whole = Plan(num_samples=20, batch_size=4, seed=3, last_batch=last_batch, repeats=repeats)
    plan = SpanPlan.of(whole, SPANS)
    for epoch, batches in {0: [], 1: [(3, 7), (7, 10), (12, 13)], 2: [], 3: [(0, 4), (4, 8)]}.items():
        assert plan.num_batches(epoch) == len(plan.epoch(epoch)) == len(batches)
        assert plan.batch_spans(epoch) == batches
        for number, (start, stop) in enumerate(batches):
            batch = plan.epoch(epoch)[number]
            assert len(batch.valid) == (4 if last_batch == "pad" else stop - start)
            own = batch.part(slice(stop - start))
            assert own.valid.all() and batch.valid.sum() == stop - start
            np.testing.assert_array_equal(own.position, np.arange(start, stop))
            np.testing.assert_array_equal(batch.index, whole.epoch(epoch).indices(batch.position))
            np.testing.assert_array_equal(batch.repeat, batch.position % repeats)


def test_batches_in_a_row_are_those_one_by_one():
    epoch = SpanPlan.of(Plan(num_samples=20, batch_size=4), SPANS).epoch(1)
    together, sizes = epoch.batches(0, 3)
    assert sizes == [4, 3, 1]
    np.testing.assert_array_equal(together.index, np.concatenate([epoch[number].index for number in range(3)]))


def test_epochs_after_the_last_span_are_whole():
    plan = SpanPlan.of(Plan(num_samples=20, batch_size=4), SPANS)
    assert plan.num_batches(4) == 5 and len(plan) == 3 and not plan.num_batches(0)
