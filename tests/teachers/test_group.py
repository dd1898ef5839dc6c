"""Several teachers of different kinds side by side: small networks in real runtimes."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import EnsembleSettings, TeacherGroupSettings, TeacherSettings, with_runtimes
from tests.networks import IMAGE_SHAPE, ConvNet, random_images
from tests.teachers.onnx_models import linear_model

ANIMALS = ("ant", "bee", "cat", "dog", "eel")


class Tokens(nn.Module):
    """Returns a vector `[N, width]` and tokens `[N, 1 + 16, width]`, of which the first is no part of the image."""

    num_prefix_tokens = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(width)
            self.embed = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        patches = self.embed(images).flatten(2).mT
        pooled = patches.mean(1)
        return {"pooled": pooled, "spatial": torch.cat([pooled[:, None], patches], 1)}


def open_module(module: nn.Module, **settings: object) -> Teacher:
    return open_teacher(TeacherSettings(**settings), module=module, image_shape=IMAGE_SHAPE)


def classifier(path: Path, classes: Sequence[str] = ANIMALS) -> Teacher:
    value = ("images", onnx.TensorProto.FLOAT, ["N", *IMAGE_SHAPE])
    onnx.save(linear_model(inputs=(value,), metadata={"kd_pipeline.classes": json.dumps(classes)}), path)
    return open_teacher(TeacherSettings(backend="onnxruntime", onnx=path))


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Teacher]:
    """A DINO-like and a CLIP-like teacher of different widths, and a classifier."""
    return {
        "dino": open_module(Tokens(24)),
        "clip": open_module(Tokens(40), precision="bf16"),
        "classes": classifier(tmp_path / "classes.onnx"),
    }


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, output in found.items():
        assert torch.equal(output, wanted[name]), name


def test_outputs_are_those_of_members(members: dict[str, Teacher]) -> None:
    group, images = TeacherGroup(members), random_images(5)
    wanted = {f"{name}.{key}": output for name, member in members.items() for key, output in member(images).items()}
    assert_equal(group(images), wanted)
    assert group.outputs.keys() == wanted.keys()
    assert group.outputs["dino.spatial"] == TensorSpec((None, 17, 24), torch.float32, 1)
    assert str(group.outputs["clip.pooled"]) == "[any, 40] float32"
    assert group.classes is None and group.logits == {"classes.logits": ANIMALS}
    assert group.runtimes == ("onnxruntime fp32", "pytorch bf16", "pytorch fp32")  # by name


def test_group_keeps_contract(members: dict[str, Teacher]) -> None:
    group, images = TeacherGroup(members), random_images(4)
    before, opening_s = images.clone(), sum(member.busy_s for member in members.values())
    outputs = group(images.requires_grad_())
    assert all(not output.requires_grad for output in outputs.values()) and torch.equal(images, before)
    assert all(group.outputs[name].accepts(tuple(output.shape), output.dtype) for name, output in outputs.items())
    kept = {name: output.clone() for name, output in outputs.items()}
    group(random_images(4, seed=1))
    assert_equal(outputs, kept)
    assert group.num_calls == 2 and group.busy_s >= sum(member.busy_s for member in members.values()) - opening_s > 0


def test_members_may_differ_in_runtime(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export_onnx(ConvNet(1), tmp_path / "net.onnx", image_shape=IMAGE_SHAPE)
    settings = {
        "module": TeacherSettings(model=ModelSettings(factory="tests.teachers.test_group:tokens"), backend="pytorch"),
        "openvino": TeacherSettings(onnx=tmp_path / "net.onnx", backend="openvino", precision="fp32"),
        "ort": TeacherSettings(onnx=tmp_path / "net.onnx", backend="onnxruntime", outputs=("features",)),
    }
    common = {"image_shape": IMAGE_SHAPE, "plugins": ["tests.teachers.test_group"]}
    group, images = open_teacher(TeacherGroupSettings(members=settings), **common), random_images(3)
    assert [*group.outputs] == [
        *("module.pooled", "module.spatial", "openvino.logits", "openvino.features", "ort.features")
    ]
    outputs = group(images)
    for name, each in settings.items():
        alone = open_teacher(each, **common)
        own = {key.removeprefix(f"{name}."): output for key, output in outputs.items() if key.startswith(f"{name}.")}
        assert_equal(own, alone(images))


def tokens() -> nn.Module:
    return Tokens(24)


def test_close_closes_each_member_once(members: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    for name, member in members.items():
        monkeypatch.setattr(member, "_release", lambda name=name: closed.append(name))
    group = TeacherGroup(members)
    group.close()
    group.close()
    assert sorted(closed) == ["classes", "clip", "dino"]


def test_failing_member_is_named(members: dict[str, Teacher]) -> None:
    group = TeacherGroup(members)
    members["clip"].close()
    with pytest.raises(TeacherError, match=r"the group teacher failed .*: member clip: the pytorch teacher is closed"):
        group(random_images(1))


def test_member_that_does_not_open_is_named(tmp_path: Path) -> None:
    missing = TeacherSettings(onnx=tmp_path / "none.onnx", backend="onnxruntime")
    with pytest.raises(TeacherError, match=r"^member clip: .*none\.onnx"):
        open_teacher(TeacherGroupSettings(members={"clip": missing}), image_shape=IMAGE_SHAPE)


def test_problems_name_the_member(members: dict[str, Teacher]) -> None:
    members["dino"].problems = ("it is always 0",)
    assert TeacherGroup(members).problems == ("member dino: it is always 0",)


def test_max_batch_is_smallest() -> None:
    group = TeacherGroup({"a": open_module(Tokens(8), max_batch=9), "b": open_module(Tokens(8), max_batch=4)})
    with pytest.raises(TeacherError, match="the group teacher takes 1 to 4 images at a time, got 5"):
        group(random_images(5))


def test_different_images_are_refused(tmp_path: Path) -> None:
    onnx.save(linear_model(), tmp_path / "small.onnx")
    small = open_teacher(TeacherSettings(backend="onnxruntime", onnx=tmp_path / "small.onnx"))
    with pytest.raises(TeacherError, match=r"share their images: member small \(onnxruntime\) has \[any, 3, 8, 8\]"):
        TeacherGroup({"dino": open_module(Tokens(8)), "small": small})


def test_fingerprint_depends_on_names_and_members() -> None:
    one, two = open_module(Tokens(8)), open_module(Tokens(16))
    group = TeacherGroup({"a": one, "b": two})
    assert TeacherGroup({"b": two, "a": one}).fingerprint == group.fingerprint
    others = [TeacherGroup({"a": two, "b": one}), TeacherGroup({"a": one, "c": two}), TeacherGroup({"a": one})]
    assert len({each.fingerprint for each in (group, *others)}) == 4


@pytest.mark.parametrize("name", ["logits", "pooled", "spatial", "a.b", "a/b", "", "1st", "a b", "a\n", "api_key"])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a teacher cannot be called"):
        TeacherGroupSettings(members={name: TeacherSettings()})
    with pytest.raises(ConfigError, match="a teacher cannot be called"):
        TeacherGroup({name: open_module(Tokens(8))})


def test_recordings_are_no_members() -> None:
    with pytest.raises(ValueError, match="a recording cannot be a member; record the outputs of all members together"):
        TeacherGroupSettings(members={"a": TeacherSettings(path=Path("recording"))})


def test_ensemble_needs_logits(members: dict[str, Teacher]) -> None:
    with pytest.raises(TeacherError, match=r"averages logits, and member 1 \(pytorch\) returns 'pooled', 'spatial'"):
        EnsembleTeacher([members["classes"], members["dino"]])


def test_resume_keeps_runtimes_by_name() -> None:
    auto, fp32 = TeacherSettings(), TeacherSettings(precision="fp32")
    found = with_runtimes(TeacherGroupSettings(members={"b": auto, "a": fp32}), ["openvino fp32", "pytorch bf16"])
    assert isinstance(found, TeacherGroupSettings)
    assert found.members == {
        "b": TeacherSettings(backend="pytorch", precision="bf16"),
        "a": TeacherSettings(backend="openvino", precision="fp32"),
    }
    other = TeacherGroupSettings(members={"a": auto})
    assert with_runtimes(other, ["pytorch fp32", "pytorch bf16"]) == other


# Classes


def test_class_order_of_each_member(tmp_path: Path) -> None:
    order = ("dog", "ant", "eel", "cat", "bee")
    members = {
        "one": classifier(tmp_path / "one.onnx"),
        "dino": open_module(Tokens(8)),
        "two": classifier(tmp_path / "two.onnx", ANIMALS[::-1]),
    }
    images = random_images(4)
    wanted = {name: members[name](images)["logits"] for name in ("one", "two")}
    group = match_classes(TeacherGroup(members), order)
    outputs = group(images)
    for position, name in enumerate(order):
        assert torch.equal(outputs["one.logits"][:, position], wanted["one"][:, ANIMALS.index(name)])
        assert torch.equal(outputs["two.logits"][:, position], wanted["two"][:, ANIMALS[::-1].index(name)])
    assert group.logits == {"one.logits": order, "two.logits": order} and "dino.pooled" in outputs


def test_foreign_logits_are_refused_only_if_used(members: dict[str, Teacher], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    flowers = ("rose", "tulip")
    for used in (None, {"dino.pooled", "classes.logits"}):
        with pytest.raises(TeacherError, match="member classes: the teacher's 5 classes are not the data's 2"):
            match_classes(TeacherGroup(members), flowers, used=used)
    group = match_classes(TeacherGroup(members), flowers, used={"dino.pooled"})
    assert [*group.outputs] == ["clip.pooled", "clip.spatial", "dino.pooled", "dino.spatial"] and not group.logits
    assert "classes.logits are left out, as the loss does not use them" in caplog.text
    num_calls = members["classes"].num_calls
    assert group(random_images(2)).keys() == group.outputs.keys()
    assert members["classes"].num_calls == num_calls  # nothing is computed in vain


def test_foreign_logits_of_one_teacher() -> None:
    teacher = open_module(ConvNet())
    with pytest.raises(TeacherError, match="has 10 logits and no class names, the data has 5 classes"):
        match_classes(teacher, ANIMALS)
    assert match_classes(teacher, ANIMALS, used={"features"}) is teacher and [*teacher.outputs] == ["features"]
    assert [*teacher(random_images(2))] == ["features"]


# Chosen outputs


@pytest.mark.parametrize("backend", ["pytorch", "openvino", "onnxruntime"])
def test_chosen_outputs(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend if backend != "pytorch" else "torch")
    images, net, path = random_images(3), ConvNet(), tmp_path / "net.onnx"
    if backend != "pytorch":
        export_onnx(net, path, image_shape=IMAGE_SHAPE)

    def opened(*outputs: str) -> Teacher:
        settings = TeacherSettings(backend=backend, onnx=None if backend == "pytorch" else path, outputs=outputs)
        return open_teacher(settings, module=net if backend == "pytorch" else None, image_shape=IMAGE_SHAPE)

    whole, chosen = opened(), opened("features")
    wanted = whole(images)
    assert chosen.outputs == {"features": whole.outputs["features"]} and wanted.keys() == {"logits", "features"}
    assert_equal(chosen(images), {"features": wanted["features"]})
    # Which outputs are kept changes none of them: a run may resume with a recording of those that it uses.
    assert chosen.fingerprint == whole.fingerprint
    with pytest.raises(ConfigError, match=r"has no output 'feature'; did you mean 'features'\?.*'logits' \[any, 10\]"):
        opened("feature")


def test_reordered_logits_can_be_left_out(tmp_path: Path) -> None:
    teacher = match_classes(classifier(tmp_path / "net.onnx"), ANIMALS[::-1])
    with pytest.raises(ConfigError, match="name at least one"):
        teacher.keep_outputs([])
    teacher.keep_outputs(["logits"])
    assert [*teacher(random_images(2))] == ["logits"]


def test_members_of_members_are_refused() -> None:
    nested = {"members": {"a": {"members": [{"onnx": "net.onnx"}]}}}
    with pytest.raises(ValueError, match="members"):
        TeacherGroupSettings.model_validate(nested)
    assert isinstance(EnsembleSettings.model_validate(nested["members"]["a"]), EnsembleSettings)
