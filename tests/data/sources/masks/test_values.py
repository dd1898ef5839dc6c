"""Values of masks become classes as the settings say, and values that are none are refused."""

import numpy as np
import pytest
from pydantic import ValidationError

from kd_pipeline.data.headers import UnreadableFileError
from kd_pipeline.data.sources.masks.settings import MaskSettings
from kd_pipeline.data.sources.masks.values import MaskValues
from tests.data.sources.helpers import error_of

CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def classes_of(pixels: list[int], dtype: str = "u1", classes: list[str] | None = None, **settings: object) -> list[int]:
    found = MaskValues(MaskSettings(**settings), classes, "masks")
    return found.classes_of(np.array([pixels], dtype=dtype))[0].tolist()


def test_values_are_classes():
    assert classes_of([0, 1, 2, 255], num_classes=3) == [0, 1, 2, 255]
    assert classes_of([0, 1, 2, 9], num_classes=3, ignore_index=9) == [0, 1, 2, 9]
    assert classes_of([0, 1], classes=["sky", "road"]) == [0, 1]


def test_the_ignore_index_may_be_a_class():
    assert classes_of([0, 1, 2], num_classes=3, ignore_index=0) == [0, 1, 2]


def test_values_that_are_not_listed_are_ignored():
    assert classes_of([0, 7, 33, 34, 255], values=CITYSCAPES) == [255, 0, 18, 255, 255]
    assert classes_of([-1, 7, 70_000], "i4", values=CITYSCAPES) == [255, 0, 255]


def test_several_values_may_be_one_class():
    assert classes_of([7, 8, 9, 10], values=[7, [8, 10]]) == [0, 1, 255, 1]


def test_classes_may_count_from_one():
    assert classes_of([0, 1, 150], num_classes=150, first_class=1) == [255, 0, 149]


@pytest.mark.parametrize(("dtype", "value"), [("u1", 3), ("u1", 254), ("u2", 3000), ("i4", -1), ("i8", 2**40)])
def test_a_value_that_is_no_class_is_named(dtype, value):
    with pytest.raises(UnreadableFileError, match=f"it has the value {value} in row 0, which is neither a class"):
        classes_of([0, value, 1, value, 255], dtype, num_classes=3)


def test_classes_are_small_integers():
    assert MaskValues(MaskSettings(num_classes=256), None, "m").dtype == np.uint8
    many = MaskValues(MaskSettings(num_classes=300, ignore_index=999), None, "m")
    assert many.dtype == np.int16
    assert many.classes_of(np.array([[299, 999]], np.uint16)).tolist() == [[299, 999]]


def test_the_number_of_classes_must_be_known():
    assert "m: how many classes" in error_of(MaskValues, MaskSettings(), None, "m")
    message = error_of(MaskValues, MaskSettings(num_classes=3), ["sky", "road"], "m")
    assert "num_classes under masks says 3 classes, and the names in `classes` 2" in message


def test_settings_that_contradict_are_refused():
    assert "values under masks 2" in error_of(MaskValues, MaskSettings(num_classes=3, values=[1, 2]), None, "m")
    assert "have values" in error_of(MaskValues, MaskSettings(values=[1, 2], ignore_index=1), None, "m")
    message = error_of(MaskValues, MaskSettings(num_classes=3, first_class=1, ignore_index=0), None, "m")
    assert "ignore_index 0 is one of the 3 classes" in message
    for wrong in ({"values": []}, {"values": [1], "first_class": 1}, {"values": [4, [5, 4]]}, {"ignore_index": -100}):
        with pytest.raises(ValidationError):
            MaskSettings(**wrong)


def test_whatever_changes_the_classes_changes_the_digest():
    settings = [{}, {"ignore_index": 9}, {"first_class": 1}, {"values": [0, 2, 1]}, {"values": [0, 1, [2, 3]]}]
    digests = {MaskValues(MaskSettings(num_classes=3, **each), None, "m").digest() for each in settings}
    assert len(digests) == len(settings)
    assert MaskValues(MaskSettings(num_classes=4), None, "m").digest() not in digests
