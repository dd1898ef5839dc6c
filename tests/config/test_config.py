"""`Config`: what it says about settings that do not fit together."""

from pathlib import Path

from kd_pipeline.config.config import load_config

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
