"""How steps that were trained again are compared with what a run recorded."""

from kd_pipeline.training.evidence import Evidence
from kd_pipeline.workflows.verification.facts import Facts, Tolerance
from kd_pipeline.workflows.verification.replay import compare_replay


def test_steps_without_evidence_cannot_be_checked() -> None:
    facts = Facts()
    tolerance = Tolerance(is_exact=True, why="", relative=1e-3)
    assert compare_replay("last steps", Evidence(), Evidence(), facts, tolerance, first_step=8) == 0
    (fact,) = facts.found
    assert (fact.name, fact.state) == ("last steps", "cannot be checked") and "after step 8" in fact.text
