"""`Config`: what it says about settings that do not fit together."""

from pathlib import Path

from kd_pipeline.config.config import default_terms, load_config

_CONFIG = """\
data:
  batch_size: 8
  train: {source: {kind: image_folder, root: x}, transform: {preset: train, size: 32}}
  val: {source: {kind: image_folder, root: y}, transform: {preset: eval, size: 32}}
"""


def test_splits_normalized_differently(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(_CONFIG)
    assert load_config(path).remarks == ()
    (remark,) = load_config(path, ["data.val.transform.std=[0.5, 0.5, 0.5]"]).remarks
    assert "data.val.transform.std is [0.5, 0.5, 0.5]" in remark


def test_splits_turned_differently(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(_CONFIG)
    (remark,) = load_config(path, ["data.train.transform.orientation=stored"]).remarks
    assert "data.val.transform.orientation is upright and that of data.train is stored" in remark


def test_evaluation_on_training_images(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(_CONFIG)
    (remark,) = load_config(path, ["data.val.source.root=x"]).remarks
    assert "data.val.source is that of data.train" in remark


def test_evaluation_on_random_crops(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(_CONFIG)
    (remark,) = load_config(path, ["data.val.transform.preset=train"]).remarks
    assert remark.endswith("set preset: eval")
    assert load_config(path, ["data.val.transform.preset=eval"]).remarks == ()


def test_student_without_head_learns_features(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(_CONFIG)
    overrides = ["student={timm: resnet18, num_classes: 0}", "teacher={model: {timm: resnet34, num_classes: 0}}"]
    distill = load_config(path, overrides).distill
    assert distill.loss is None
    assert distill.term_names == ("cosine.pooled", "am_radio.spatial")
    assert [term.weight for term in distill.features] == [1, 1]
    assert load_config(path, [*overrides, "distill.features=[{loss: am_radio}]"]).distill.term_names == ("am_radio",)


def test_each_of_several_teachers_has_its_terms() -> None:
    terms = [(term.loss, term.student, term.teacher) for term in default_terms(["dino", "clip"])]
    assert terms == [
        ("cosine", "pooled", "dino.pooled"),
        ("am_radio", "spatial", "dino.spatial"),
        ("cosine", "pooled", "clip.pooled"),
        ("am_radio", "spatial", "clip.spatial"),
    ]
