import math

import pytest
from pydantic import ValidationError

from kd_pipeline._core.settings import Settings
from kd_pipeline.config.reader import read_config
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.ramp import Ramp, min_value, value_at

BOUNDED = ["linear", "cosine", "exponential"]


@pytest.mark.parametrize("epoch", [0, 0.3, 5, 100])
def test_plain_number(epoch):
    assert value_at(4.0, epoch, 10) == 4.0


@pytest.mark.parametrize("kind", BOUNDED)
@pytest.mark.parametrize(("start", "end"), [(0.7, 0.1), (0.1, 0.7), (10.0, 0.1), (3.0, 3.0)])
def test_start_and_end_are_exact(kind, start, end):
    ramp = Ramp(start=start, end=end, kind=kind)
    assert [value_at(ramp, epoch, 10) for epoch in (0, 10, 10.5, 40)] == [start, end, end, end]


@pytest.mark.parametrize("kind", BOUNDED)
def test_own_epochs(kind):
    ramp = Ramp(start=1.0, end=2.0, kind=kind, epochs=2.5)
    assert value_at(ramp, 2.4, 10) < 2.0 == value_at(ramp, 2.5, 10)
    assert value_at(ramp, 1.0, 10) == value_at(ramp, 1.0, 99)


@pytest.mark.parametrize(
    ("kind", "at_quarter", "at_half"),
    [("linear", 3.0, 5.0), ("cosine", 1 + 8 * (1 - math.sqrt(0.5)) / 2, 5.0), ("exponential", math.sqrt(3), 3.0)],
)
def test_kinds(kind, at_quarter, at_half):
    ramp = Ramp(start=1.0, end=9.0, kind=kind)
    assert value_at(ramp, 2, 8) == pytest.approx(at_quarter)
    assert value_at(ramp, 4, 8) == pytest.approx(at_half)


def test_decay():
    ramp = Ramp(start=10, end=1, kind="decay", rate=0.9)
    temperature = 10.0
    for epoch in range(31):
        assert value_at(ramp, epoch, 30) == pytest.approx(temperature, rel=1e-12)
        temperature = 1 + 0.9 * (temperature - 1)


@pytest.mark.parametrize("kind", [*BOUNDED, "decay"])
@pytest.mark.parametrize(("start", "end"), [(0.5, 8.0), (8.0, 0.5)])
def test_min_value(kind, start, end):
    ramp = Ramp(start=start, end=end, kind=kind, rate=0.5 if kind == "decay" else None)
    values = [value_at(ramp, step / 7, 10) for step in range(141)]
    assert min_value(ramp) == 0.5 == pytest.approx(min(values), rel=1e-3)
    assert min(values) >= 0.5 and max(values) <= 8.0
    assert min_value(3.0) == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "decay"}, "needs a rate"),
        ({"kind": "decay", "rate": 0.9, "epochs": 3}, "epochs: 3 has no effect on kind: decay"),
        ({"kind": "linear", "rate": 0.9}, "rate: 0.9 has no effect on kind: linear"),
        ({"kind": "exponential", "end": 0}, "numbers above 0, got 1 and 0"),
        ({"kind": "decay", "rate": 1.0}, "less than 1"),
        ({"epochs": 0}, "greater than 0"),
        ({"kind": "sine"}, "'linear', 'cosine', 'exponential' or 'decay'"),
        ({"start": math.inf}, "finite number"),
    ],
)
def test_invalid_ramp(settings, message):
    with pytest.raises(ValidationError, match=message):
        Ramp(**{"start": 1.0, "end": 2.0, **settings})


class Holder(Settings):
    temperature: float | Ramp = 4.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("temperature: 2", 2.0),
        ("temperature: {start: 4, end: 1}", Ramp(start=4, end=1)),
        ("temperature: {start: 4, end: 1, kind: decay, rate: 0.5}", Ramp(start=4, end=1, kind="decay", rate=0.5)),
    ],
)
def test_number_or_ramp_in_yaml(tmp_path, text, found):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert read_config(Holder, path).temperature == found


def test_unknown_key(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("temperature: {start: 4, stop: 1}")
    with pytest.raises(ConfigError) as caught:
        read_config(Holder, path)
    assert "temperature.stop: unknown key; known keys: start, end" in str(caught.value)
