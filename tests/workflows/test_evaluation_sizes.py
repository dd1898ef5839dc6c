"""Sizes and crops that models are compared at, each as a config with that size would give it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_pipeline import load_config
from kd_pipeline.data.transforms import EvalTransform, TrainTransform
from kd_pipeline.data.views import EvalView
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.evaluation._compare import Comparison, compare
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.models.registry import ModelSettings, open_model
from kd_pipeline.onnx.export import export_onnx
from kd_pipeline.workflows._compare import TEACHER, compare_files
from kd_pipeline.workflows.evaluation_sizes import EvaluationSizes

OWN = EvalTransform(size=32)
NETWORK = "{builtin: small_resnet, num_classes: 3, kwargs: {width: 4}}"


def test_each_size_has_each_crop() -> None:
    found = EvaluationSizes.of(OWN, [24, 32, (48, 64)], [0.875, 1])
    assert {label: (each.size, each.crop.shorter) for label, each in found.transforms.items()} == {
        "at 24, crop 0.875": (24, 27),
        "at 24, crop 1": (24, 24),
        "at 32, crop 0.875": (32, 37),
        "at 32, crop 1": (32, 32),
        "at 48x64, crop 0.875": ((48, 64), 55),
        "at 48x64, crop 1": ((48, 64), 48),
    }
    assert found.view_names["at 32, crop 0.875"] == "images"
    assert list(found.views) == [label for label in found.transforms if label != "at 32, crop 0.875"]
    assert found.views["at 24, crop 1"] == EvalView(**found.transforms["at 24, crop 1"].model_dump())


@pytest.mark.parametrize(("resize", "wanted"), [(None, {48: 55, 32: 37}), (40, {48: 60, 32: 40}), (33, {64: 66})])
def test_crop_is_that_of_the_split(resize: int | None, wanted: dict[int, int]) -> None:
    own = OWN.model_copy(update={"resize": resize, "interpolation": "bicubic", "dtype": "float16"})
    found = EvaluationSizes.of(own, [*wanted])
    assert {each.size: each.crop.shorter for each in found.transforms.values()} == wanted
    assert {(each.interpolation, each.dtype) for each in found.transforms.values()} == {("bicubic", "float16")}
    assert [name for name in found.view_names.values() if name == "images"] == ["images"] * (32 in wanted)


def test_size_is_that_of_the_split() -> None:
    assert list(EvaluationSizes.of(EvalTransform(size=[48, 64]), (), [1]).transforms) == ["at 48x64, crop 1"]
    random = EvaluationSizes.of(TrainTransform(size=32), (), [0.875])
    assert random.view_names == {"at 32, crop 0.875": "at 32, crop 0.875"}, "and not its random images"


@pytest.mark.parametrize(
    ("sizes", "crops", "message"),
    [
        ([24], [0], "crops: 0 is no fraction of the image; give one above 0, up to 1"),
        ([24], [1.2], "crops: 1.2 is no fraction"),
        ([24], [float("nan")], "crops: nan is no fraction"),
        ([24, 24], [], "sizes and crops have 'at 24' twice"),
        ([24, (24, 24)], [], "sizes and crops have 'at 24' twice"),
        ([9000], [], "sizes: 9000: "),
        ([512], [0.01], "sizes: 512: Input should be less than or equal to 16384"),
    ],
)
def test_what_is_out_of_range_is_refused(sizes: list[Any], crops: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EvaluationSizes.of(OWN, sizes, crops)


@pytest.fixture(scope="module")
def config(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and a teacher with weights."""
    folder = tmp_path_factory.mktemp("sizes")
    for number, name in enumerate(("student", "teacher")):
        torch.manual_seed(number)
        settings = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
        torch.save(open_model(settings).state_dict(), folder / f"{name}.pt")
    (folder / "config.yaml").write_text(
        f"data: {{batch_size: 8, device: cpu, val: {{source: {{kind: image_folder, root: {photo_folder}}}, "
        f"transform: {{preset: eval, size: 32}}}}}}\nstudent: {NETWORK}\n"
        f"teacher: {{model: {NETWORK[:-1]}, checkpoint: {folder / 'teacher.pt'}}}}}\n"
    )
    return folder / "config.yaml"


def rows(comparison: Comparison) -> dict[str, dict[str, Any]]:
    return {row.name: json.loads(json.dumps(row.evaluation.to_dict())) for row in comparison.rows}


@pytest.mark.slow
def test_each_row_is_that_of_a_config_with_its_size(config: Path) -> None:
    student = str(config.parent / "student.pt")
    found = rows(compare_files(load_config(config), [student], sizes=[24, 32, 48], crops=[0.875, 1]))
    labels = [f"at {size}, crop {crop}" for size in (24, 32, 48) for crop in ("0.875", "1")]
    assert list(found) == [
        f"{name}{end}" for name in (TEACHER, student) for end in (*(f" {each}" for each in labels), ", averaged")
    ]
    for size, crop, resize in ((24, "0.875", 27), (32, "0.875", 37), (48, "1", 48)):
        overrides = [f"data.val.transform.size={size}", f"data.val.transform.resize={resize}"]
        alone = rows(compare_files(load_config(config, overrides), [student]))
        assert {name: found[f"{name} at {size}, crop {crop}"] for name in alone} == alone
    today = rows(compare_files(load_config(config), [student]))
    assert {name: found[f"{name} at 32, crop 0.875"] for name in today} == today
    assert found[f"{student}, averaged"]["agreement"] is not None


@pytest.mark.slow
def test_file_of_one_size_is_refused_with_the_size(config: Path, tmp_path: Path) -> None:
    network = open_model(ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4}))
    file = export_onnx(network, tmp_path / "fixed.onnx", image_shape=(3, 32, 32))
    without = {"teacher": None, "crops": [1]}
    assert list(rows(compare_files(load_config(config), [file], sizes=[32], **without))) == [f"{file} at 32, crop 1"]
    with pytest.raises(
        TeacherError, match=r"^for images of 48 x 48: .* takes images \[any, 3, 32, 32\].*leave out this"
    ):
        compare_files(load_config(config), [file], sizes=[32, 48], **without)


def test_network_of_one_size_is_refused_with_the_size(config: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 32 * 32, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(images.flatten(1))

    views = {"large": EvalView(size=48)}
    with (
        KDDataLoader.from_config(load_config(config), "val", views=views, shard=None) as loader,
        pytest.raises(
            ConfigError, match=r"fixed: view 'large': the model fails on images of 48 x 48, .*Leave out this"
        ),
    ):
        compare({"fixed": Fixed()}, loader, sizes={"at 32": "images", "at 48": "large"})


def test_model_without_logits_has_one_size(config: Path) -> None:
    headless = open_model(ModelSettings(timm="test_resnet", num_classes=0))
    with (
        KDDataLoader.from_config(load_config(config), "val") as loader,
        pytest.raises(ConfigError, match="backbone: a model without logits is judged at one size; leave out sizes"),
    ):
        compare({"backbone": headless}, loader, sizes={"at 32": "images"})


def test_time_of_the_mean_is_that_of_all_views(config: Path) -> None:
    network = open_model(ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4}))
    with KDDataLoader.from_config(load_config(config), "val", views={"48": EvalView(size=48)}) as loader:
        found = compare({"net": network}, loader, sizes={"at 32": "images", "at 48": "48"})
    costs = {row.name: row.cost.ms_per_image for row in found.rows}
    assert list(costs) == ["net at 32", "net at 48", "net, averaged"]
    assert costs["net, averaged"] == costs["net at 32"] + costs["net at 48"]
    assert "net at 48" in found.table()


def test_sizes_take_the_place_of_views(config: Path) -> None:
    views = ["data.val.views={large: {follow: images, size: 48}}", "teacher.view=large", "student.view=large"]
    student = str(config.parent / "student.pt")
    found = rows(compare_files(load_config(config, views), [student], sizes=[24]))
    assert found == rows(compare_files(load_config(config), [student], sizes=[24]))


def test_view_with_another_normalization_is_refused(config: Path) -> None:
    views = ["data.val.views={other: {follow: images, size: 48, mean: [0.5, 0.5, 0.5]}}", "teacher.view=other"]
    with pytest.raises(ConfigError, match="sees the view other, which has another mean, std or dtype"):
        compare_files(load_config(config, views), sizes=[24])
