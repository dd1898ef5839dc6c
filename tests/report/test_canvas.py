import pytest

from kd_pipeline.report.canvas import ticks


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.93, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 59_000, [0, 10_000, 20_000, 30_000, 40_000, 50_000, 60_000]),
        (1.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, -3.0, [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]),
        (1e-5, 3e-5, [1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)
