"""Teachers whose class order differs from the data's; they are ONNX files of small networks with class names."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from kd_pipeline.errors import TeacherError
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import PermutedTeacher, match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherSettings
from tests.networks import CLASSES, IMAGE_SHAPE, ConvNet, random_images
from tests.teachers.onnx_models import linear_model

ANIMALS = ("ant", "bee", "cat", "dog", "eel")
SHAPE = (3, 8, 8)


def five(path: Path, classes: Sequence[str] | None = ANIMALS, backend: str = "onnxruntime", seed: int = 0) -> Teacher:
    """Five logits with these names."""
    metadata = None if classes is None else {"kd_pipeline.classes": json.dumps(classes)}
    onnx.save(linear_model(metadata=metadata, seed=seed), path)
    return open_teacher(TeacherSettings(backend=backend, onnx=path))


@pytest.fixture(params=["openvino", "onnxruntime"])
def teacher(request, tmp_path) -> Iterator[Teacher]:
    pytest.importorskip(request.param)
    opened = five(tmp_path / "teacher.onnx", backend=request.param)
    yield opened
    opened.close()


def test_logits_are_matched_by_name(teacher: Teacher) -> None:
    order = ("dog", "ant", "eel", "cat", "bee")
    images = random_images(7, shape=SHAPE)
    wanted = teacher(images)["logits"]
    logits = match_classes(teacher, order)(images)["logits"]
    for position, name in enumerate(order):
        assert torch.equal(logits[:, position], wanted[:, ANIMALS.index(name)])
    assert logits.is_contiguous() and match_classes(teacher, order).classes == order


def test_same_order_returns_teacher(teacher: Teacher, caplog) -> None:
    assert match_classes(teacher, ANIMALS) is teacher
    assert match_classes(teacher, list(ANIMALS)) is teacher
    assert match_classes(teacher, None) is teacher
    assert not caplog.records


def test_reordering_is_warned_with_first_difference(teacher: Teacher, caplog) -> None:
    match_classes(teacher, ("ant", "cat", "bee", "dog", "eel"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the data's 5 classes in a different order (class 1 is 'cat' in the data and 'bee' in the teacher)" in (
        record.getMessage()
    )


def test_extra_classes_are_dropped_with_warning(tmp_path: Path, caplog) -> None:
    teacher = five(tmp_path / "t.onnx", ("background", "bee", "ant", "cat", "dog"))
    images = random_images(4, shape=SHAPE)
    found = match_classes(teacher, ("ant", "bee", "cat"))
    assert torch.equal(found(images)["logits"], teacher(images)["logits"][:, [2, 1, 3]])
    assert str(found.outputs["logits"]) == "[any, 3] float32"
    (record,) = caplog.records
    assert "has 5 classes, of which the data has 3" in record.getMessage()
    assert "those of 'background', 'dog' are dropped" in record.getMessage()


def test_missing_classes_are_refused(teacher: Teacher) -> None:
    with pytest.raises(
        TeacherError,
        match=r"the teacher's 5 classes are not the data's 5: it lacks 'cow', 'fly', "
        r"and the data has no 'dog', 'eel'; give the source `classes`",
    ):
        match_classes(teacher, ("ant", "bee", "cat", "cow", "fly"))
    with pytest.raises(TeacherError, match=r"the data's 6: it lacks 'fly'; give"):
        match_classes(teacher, (*ANIMALS, "fly"))


def test_duplicate_class_is_refused(tmp_path: Path) -> None:
    teacher = five(tmp_path / "t.onnx", ("crane", "bee", "crane", "ant", "eel"))
    with pytest.raises(TeacherError, match="the teacher has 'crane' more than once among its 5 classes"):
        match_classes(teacher, ("bee", "crane", "ant"))
    assert match_classes(teacher, ("eel", "bee")).classes == ("eel", "bee")


def test_nameless_teacher_needs_same_num_classes(tmp_path: Path) -> None:
    teacher = five(tmp_path / "t.onnx", None)
    assert match_classes(teacher, ANIMALS) is teacher
    for classes in (ANIMALS[:4], (*ANIMALS, "fly")):
        with pytest.raises(TeacherError, match=rf"5 logits and no class names, the data has {len(classes)} classes"):
            match_classes(teacher, classes)
    with pytest.raises(TeacherError, match="has no class names"):
        PermutedTeacher(teacher, ANIMALS)


def test_background_class_is_dropped(tmp_path: Path) -> None:
    names = [f"n{number:08}" for number in range(1000)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 1001))
    path = export_onnx(net, tmp_path / "t.onnx", image_shape=SHAPE, classes=("background", *names))
    teacher = open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))
    images = random_images(3, shape=SHAPE)
    assert torch.equal(match_classes(teacher, names)(images)["logits"], teacher(images)["logits"][:, 1:])


def test_permuted_teacher_keeps_contract(exported) -> None:
    inner = open_teacher(TeacherSettings(backend="onnxruntime", onnx=exported(0), max_batch=5))
    teacher = PermutedTeacher(inner, CLASSES[::-1])
    images = random_images(4)
    before = images.clone()
    outputs = teacher(images.requires_grad_())
    assert outputs.keys() == teacher.outputs.keys() == {"logits", "features"}
    assert torch.equal(outputs["features"], inner(images)["features"])
    assert not outputs["logits"].requires_grad and torch.equal(images, before)
    for name, output in outputs.items():
        assert teacher.outputs[name].accepts(tuple(output.shape), output.dtype)
    kept = outputs["logits"].clone()
    teacher(random_images(4, seed=1))
    assert torch.equal(outputs["logits"], kept)
    assert (teacher.backend, teacher.precision, teacher.max_batch) == ("onnxruntime", "fp32", 5)
    with pytest.raises(TeacherError, match="takes 1 to 5 images at a time, got 6"):
        teacher(random_images(6))
    teacher.close()
    teacher.close()
    for closed in (teacher, inner):
        with pytest.raises(TeacherError, match="the onnxruntime teacher is closed"):
            closed(random_images(1))


def test_fingerprint_depends_on_teacher_and_order(tmp_path: Path) -> None:
    first, other = five(tmp_path / "a.onnx"), five(tmp_path / "b.onnx", seed=1)
    orders = [("bee", "ant"), ("ant", "bee"), ANIMALS[::-1]]
    prints = [PermutedTeacher(first, order).fingerprint for order in orders]
    assert PermutedTeacher(first, orders[0]).fingerprint == prints[0]
    assert len({first.fingerprint, *prints, PermutedTeacher(other, orders[0]).fingerprint}) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_gpu_sync() -> None:
    inner = open_teacher(TeacherSettings(), module=ConvNet(), image_shape=IMAGE_SHAPE, device="cuda")
    inner.classes = CLASSES
    teacher, images = PermutedTeacher(inner, CLASSES[::-1]), random_images(4).cuda()
    teacher(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
