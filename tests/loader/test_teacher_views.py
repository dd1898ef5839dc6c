"""Who sees which view: one buffer for each view, groups of several views, states and recordings that know theirs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.data.mixing import MixSettings
from kd_pipeline.data.sources import ImageFolder
from kd_pipeline.data.views import FollowingView, TrainView
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.ensemble import EnsembleTeacher
from kd_pipeline.teachers.group import TeacherGroup
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import TeacherGroupSettings, TeacherSettings
from tests.streams import SIZE, TRAIN, assert_same, run, state_after

LARGE = SIZE + 8
VIEWS = {
    "teacher": FollowingView(follow="images", size=LARGE),
    "local": TrainView(size=SIZE // 2, area=(0.05, 0.4), count=3),
    "same": FollowingView(follow="images", size=SIZE, color="none"),
}
SIZES = {"images": SIZE, "teacher": LARGE, "local": SIZE // 2, "same": SIZE}
PLUGINS = [__name__]


class Spy(Teacher):
    """Means of the colors of each image; remembers what it was called with."""

    def __init__(self, view: str = "images", *, outputs: int = 3, max_batch: int = 64) -> None:
        super().__init__(
            backend="spy",
            precision="fp32",
            device=torch.device("cpu"),
            images=TensorSpec((None, 3, SIZES[view], SIZES[view]), torch.float32),
            outputs={"logits": TensorSpec((None, outputs), torch.float32)},
            max_batch=max_batch,
            classes=None,
            fingerprint="5b",
        )
        self.view = view
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        self.calls.append((images.data_ptr(), tuple(images.shape)))
        return {"logits": images.mean((2, 3)).clone()}

    def _release(self) -> None:
        pass


class OneSize(nn.Module):
    """Three logits of images of one size, and of no other."""

    def __init__(self, size: int = LARGE) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(size)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def settings(view: str = "teacher") -> TeacherSettings:
    factory = {"factory": f"{__name__}:OneSize", "kwargs": {"size": SIZES[view]}, "pretrained": False}
    return TeacherSettings(model=ModelSettings(**factory), view=view, backend="pytorch")


@pytest.fixture(scope="module")
def open_loader(photo_folder: Path) -> Callable[..., KDDataLoader]:
    source = ImageFolder(photo_folder)

    def make(teacher: Any = None, **options: Any) -> KDDataLoader:
        return KDDataLoader(source, TRAIN, teacher, **{"views": VIEWS, "batch_size": 8, "seed": 5, **options})

    return make


@pytest.mark.parametrize("mix", [None, MixSettings(mixup=0.4, cutmix=1.0)], ids=["plain", "mixed"])
@pytest.mark.parametrize("view", ["images", *VIEWS])
def test_teacher_reads_the_buffer_of_its_view(open_loader, view, mix):
    spy = Spy(view)
    with open_loader(spy, mix=mix) as loader:
        held = [*loader]
    assert spy.calls == [
        (batch.view(view).data_ptr(), (len(batch) * (3 if view == "local" else 1), 3, SIZES[view], SIZES[view]))
        for batch in held
    ]
    for batch in held:
        assert torch.equal(batch.teacher["logits"], batch.view(view).mean((-2, -1)))
        assert batch.teacher_views == ({} if view == "images" else {"logits": view})


def test_group_gives_each_member_its_view(open_loader):
    members = {"small": Spy("same"), "big": Spy("teacher"), "also_big": Spy("teacher"), "crops": Spy("local")}
    with open_loader(TeacherGroup(members)) as loader:
        assert loader.teacher_views == ("teacher", "local", "same")
        held = [*loader]
    for name, member in members.items():
        assert [pointer for pointer, _ in member.calls] == [batch.view(member.view).data_ptr() for batch in held], name
        for batch in held:
            assert torch.equal(batch.teacher[f"{name}.logits"], batch.view(member.view).mean((-2, -1)))
            assert batch.teacher_views[f"{name}.logits"] == member.view


def test_ensemble_averages_its_members_views(open_loader):
    members = [Spy("images"), Spy("teacher")]
    with open_loader(EnsembleTeacher(members, average="logits")) as loader:
        for batch in loader:
            means = torch.stack([batch.images.mean((2, 3)), batch.views["teacher"].mean((2, 3))])
            torch.testing.assert_close(batch.teacher["logits"], means.mean(0))
    copies = EnsembleTeacher([Spy("local"), Spy("local")], average="logits")
    with open_loader(copies) as loader:
        batch = next(iter(loader))
        torch.testing.assert_close(batch.teacher["logits"], batch.views["local"].mean((3, 4)))
    with (
        open_loader(EnsembleTeacher([Spy("images"), Spy("local")])) as loader,
        pytest.raises(
            TeacherError, match=r"views have different numbers \(images 8, local 24\); give its members views"
        ),
    ):
        next(iter(loader))


def test_views_and_order_of_classes_go_together(open_loader, photo_folder):
    """A wrapper of several views passes all on."""
    members = [Spy("images"), Spy("teacher")]
    ensemble = EnsembleTeacher(members, average="logits")
    ensemble.classes = ("c", "b", "a")
    teacher = match_classes(ensemble, ["a", "b", "c"])
    assert teacher is not ensemble and teacher.views == ("images", "teacher")
    source = ImageFolder(photo_folder)
    with KDDataLoader(source, TRAIN, views=VIEWS, batch_size=8) as loader:
        batch = next(iter(loader))
    wanted = ensemble.on_batch(batch)["logits"].flip(1)
    assert torch.equal(teacher.on_batch(batch)["logits"], wanted)


def test_settings_say_the_view(open_loader):
    with open_loader(settings(), plugins=PLUGINS) as loader:
        assert loader.teacher_views == ("teacher",)
        batch = next(iter(loader))
    assert torch.equal(batch.teacher["logits"], OneSize()(batch.views["teacher"]).detach())


def test_members_are_opened_for_their_views(open_loader):
    group = TeacherGroupSettings(members={"big": settings(), "crops": settings("local"), "plain": settings("images")})
    with open_loader(group, plugins=PLUGINS) as loader:
        batch = next(iter(loader))
    assert {name: list(each.shape) for name, each in batch.teacher.items()} == {
        "big.logits": [8, 3],
        "crops.logits": [8, 3, 3],
        "plain.logits": [8, 3],
    }


def test_modules_and_open_teachers_get_the_argument(open_loader):
    with open_loader(OneSize(), teacher_view="teacher") as loader:
        batch = next(iter(loader))
    assert torch.equal(batch.teacher["logits"], OneSize()(batch.views["teacher"]).detach())
    spy = Spy("same")
    spy.view = "images"
    with open_loader(spy, teacher_view="same") as loader:
        batch = next(iter(loader))
    assert spy.view == "same" and torch.equal(batch.teacher["logits"], batch.views["same"].mean((2, 3)))


def test_view_is_said_once(open_loader):
    with pytest.raises(ConfigError, match="teacher_view is 'same' and the teacher is settings; set their own view"):
        open_loader(settings(), teacher_view="same", plugins=PLUGINS)
    with pytest.raises(ConfigError, match="teacher_view is 'same', and the teacher sees teacher already"):
        open_loader(Spy("teacher"), teacher_view="same")
    group = TeacherGroup({"one": Spy("teacher"), "two": Spy("same")})
    with pytest.raises(ConfigError, match="teacher_view is 'same', and the teacher sees teacher and same already"):
        open_loader(group, teacher_view="same")


@pytest.mark.parametrize("teacher", [settings("teacher").model_copy(update={"view": "techer"}), "open"])
def test_unknown_view_is_refused(open_loader, teacher):
    if teacher == "open":
        teacher = Spy("teacher")
        teacher.view = "techer"
    with pytest.raises(ConfigError, match=r"view.*'techer'.*did you mean 'teacher'"):
        open_loader(teacher, plugins=PLUGINS)


def test_images_of_another_size_are_refused_at_once(open_loader):
    spy = Spy("teacher")
    spy.view = "same"
    with pytest.raises(TeacherError, match=r"takes images \[any, 3, 40, 40\].*change size or dtype of the view same"):
        open_loader(spy)
    group = TeacherGroup({"one": Spy("images"), "two": spy})
    with pytest.raises(TeacherError, match=r"member two: the spy teacher takes images \[any, 3, 40, 40\]"):
        open_loader(group)


def test_copies_count_for_the_largest_batch(open_loader):
    with pytest.raises(TeacherError, match="takes 1 to 23 images at a time, got 24"):
        open_loader(Spy("local", max_batch=23))
    with open_loader(
        TeacherGroup({"crops": Spy("local", max_batch=24), "whole": Spy("images", max_batch=8)})
    ) as loader:
        assert len(next(iter(loader)).teacher) == 2


def test_batches_have_the_views_that_are_shown(open_loader):
    with open_loader(shown_views=["same"]) as loader, open_loader() as whole:
        found, wanted = run(loader, 1), run(whole, 1)
        assert_same(found, [{name: batch[name] for name in found[0]} for batch in wanted])
    assert [name for name in found[0] if name.startswith("view ")] == ["view same"]


def test_state_does_not_depend_on_other_views(open_loader):
    with open_loader(Spy("teacher")) as loader:
        state = state_after(loader, 2)
    with open_loader(Spy("teacher")) as loader:
        whole = run(loader, 1)
    for views in ({"teacher": VIEWS["teacher"]}, {**VIEWS, "more": TrainView(size=SIZE)}):
        with open_loader(Spy("teacher"), views=views) as loader:
            loader.load_state_dict(state)
            found = run(loader, 1)
        for ours, theirs in zip(found, whole[2:], strict=True):
            common = ours.keys() & theirs.keys()
            assert {"images", "view teacher", "logits"} <= common
            assert all(torch.equal(ours[name], theirs[name]) for name in common)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"views": {**VIEWS, "local": TrainView(size=SIZE, count=3)}}, f"views.local.size: {SIZE // 2} → {SIZE}"),
        ({"teacher": Spy("same")}, r"teacher_views: \['teacher'\] → \['same'\]"),
        ({"teacher": Spy("images")}, r"teacher_views: \['teacher'\] → None"),
    ],
    ids=["changed view", "another view", "images"],
)
def test_state_of_another_view_is_refused(open_loader, changes, line):
    with open_loader(Spy("teacher")) as loader:
        state = state_after(loader, 1)
    with open_loader(**{"teacher": Spy("teacher"), **changes}) as loader, pytest.raises(StateError, match=line):
        loader.load_state_dict(state)


def test_fingerprints_of_groups_know_the_views() -> None:
    same = TeacherGroup({"one": Spy("images"), "two": Spy("images")})
    other = TeacherGroup({"one": Spy("images"), "two": Spy("same")})
    assert same.fingerprint != other.fingerprint


def test_closed_and_foreign_inputs_are_refused() -> None:
    group = TeacherGroup({"one": Spy("images"), "two": Spy("teacher")})
    images: Mapping[str, Tensor] = {"images": torch.zeros(2, 3, SIZE, SIZE)}
    with pytest.raises(TeacherError, match="takes images, teacher, got images; pass them by name"):
        group(images)
    group.close()
    with pytest.raises(TeacherError, match="closed"):
        group({**images, "teacher": torch.zeros(2, 3, LARGE, LARGE)})


def test_open_teacher_keeps_its_view() -> None:
    teacher = open_teacher(settings("same"), image_shape=(3, SIZE, SIZE), plugins=PLUGINS)
    assert teacher.views == ("same",) and teacher.view_of("logits") == "same"
    teacher.close()
