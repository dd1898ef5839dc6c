"""A run resumes with every change applied and logged, or refuses it, whatever the checkpoint's position."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from kd_pipeline.config.config import Config
from kd_pipeline.errors import StateError
from kd_pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows import resume_rules
from kd_pipeline.workflows.resume import check_epochs, check_resume
from kd_pipeline.workflows.resume_rules import rule_of
from tests.training import tiny_run

STAGES = ("teacher", "baseline", "distill")


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a config, groups included; `data.more.x` stands for all further splits."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}" + (".x" if f"{prefix}{name}" == "data.more" else "")
        yield key
        for group in models(field.annotation):
            yield from keys(group, f"{key}.")


KEYS = sorted({*keys(Config)})
APPLIED = {
    *("data.device", "data.decode", "data.num_threads", "data.prefetch", "data.ahead", "data.batch_size"),
    *(
        "data.train.views",
        "data.on_bad_sample",
        "data.max_bad_fraction",
        "data.test",
        "probe",
        "student.num_classes",
        "train.epochs",
    ),
    "train.callbacks",
    *("train.early_stopping", "train.select_by", "train.select_mode", "train.compare_with_teacher", "train.compile"),
    *(
        "train.channels_last",
        "train.deterministic",
        "train.export",
        "train.log_every_steps",
        "train.log_gradient_norm",
        "train.loggers",
    ),
    *("train.num_threads", "train.max_nonfinite_steps", "train.save_every_steps", "train.validate_every_steps"),
    *("feature_probe.sets", "feature_probe.every", "feature_probe.linear"),
}
CONDITIONAL = {
    *("data.train.source", "data.val", "data.more", "teacher", "train.limit_val_batches", "train.metrics"),
    "train.validate",
    *("train.early_stopping.mode", "feature_probe"),
}


def is_below(key: str, groups: set[str]) -> bool:
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def test_every_key_has_a_rule() -> None:
    for key in KEYS:
        rule = rule_of(key, "distill")
        if is_below(key, APPLIED) and not is_below(key, CONDITIONAL - {"feature_probe"}):
            assert rule == "applied", key
        elif is_below(key, CONDITIONAL):
            assert rule.startswith("if "), key
        else:
            assert rule == "refused", key


def test_rules_are_of_existing_keys() -> None:
    rules = [resume_rules.RULES, *resume_rules.RULES_OF_STAGE.values(), resume_rules._AFTER_TRAINING]
    known = {*KEYS, "data.more"}
    assert all(key in known for each in rules for key in each)


@pytest.mark.parametrize("stage", ["teacher", "baseline"])
def test_unused_settings_are_ignored(stage: str) -> None:
    for key in ("distill.temperature", "distill.features[0].weight", "teacher.backend", "probe.strict"):
        assert rule_of(key, stage) == "ignored"
    assert rule_of("feature_probe.k", "teacher") == "ignored"
    assert rule_of("distill.label_smoothing", stage) == rule_of("distill.task_loss", stage) == "refused"
    assert rule_of("distill.heads.aux", stage) == ("ignored" if stage == "teacher" else "refused")
    assert rule_of("teacher.model.kwargs.width", stage) == ("refused" if stage == "teacher" else "ignored")


# What differs, without a run


def saved(folder: Path, run: str = "run", **changes: Any) -> dict[str, Any]:
    """With the metric that selects the best student, which a run fills in before it is compared."""
    changes = {"train__select_by": "val/top1", "train__select_mode": "max", **changes}
    config = tiny_run.settings(folder, run, **changes).model_dump(mode="json")
    splits = {name: "ab" * 32 for name in ("val", *config["data"]["more"])}
    return {"config": config, "teacher": "cd" * 32, "classes": ["cat", "dog"], "data": "ef" * 32, "validation": splits}


def changes_of(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [str(change) for change in check_resume(old, new, Path("run"))]


def refused(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    with pytest.raises(StateError, match="--fresh") as caught:
        check_resume(old, new, Path("run"))
    return [line.strip() for line in str(caught.value).splitlines()[1:-1]]


def test_same_run_in_moved_folder(tmp_path: Path) -> None:
    assert changes_of(saved(tmp_path), saved(tmp_path, "moved")) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data": "00" * 32}, "data: fingerprint efefefefefef → fingerprint 000000000000 (the training images"),
        ({"teacher": "00" * 32}, "teacher: fingerprint cdcdcdcdcdcd → fingerprint 000000000000 (a teacher with"),
        ({"classes": ["cat", "cow"]}, "classes: [cat, dog] → [cat, cow]"),
        ({"classes": None}, "classes: [cat, dog] → null"),
        ({"validation": {"val": "00" * 32}}, "data.val.source: fingerprint abababababab → fingerprint 000000000000"),
    ],
)
def test_different_identity_is_refused(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    (found,) = refused(saved(tmp_path), {**saved(tmp_path), **change})
    assert found.startswith(line)


def test_many_changes_are_summarized(tmp_path: Path) -> None:
    old, new = saved(tmp_path), saved(tmp_path)
    old["classes"], new["classes"] = [*map(str, range(1000))], [*map(str, range(100, 1100))]
    *_, ninth, rest = refused(old, new)
    assert ninth == "classes[9]: '9' → '109'" and rest == "and 990 more"


def test_moved_files_of_same_content(tmp_path: Path) -> None:
    old = saved(tmp_path)
    new = saved(
        tmp_path, teacher__onnx="b.onnx", data__train__source__images="b.npz", data__val__source__images="c.npz"
    )
    assert len(changes_of(old, new)) == 3
    assert any("teacher.onnx" in line for line in refused(old, {**new, "teacher": "00" * 32}))
    assert any("data.train.source.images" in line for line in refused(old, {**new, "data": "00" * 32}))


def test_shuffle_stays_however_it_is_spelled(tmp_path: Path) -> None:
    by_default, named = saved(tmp_path), saved(tmp_path, data__train__shuffle="global")
    shards = saved(tmp_path, data__train__shuffle={"kind": "shards", "buffer": 9})
    for same in (named, saved(tmp_path, data__train__shuffle=True)):
        assert changes_of(by_default, same) == changes_of(same, named) == []
    assert refused(named, shards) == ["data.train.shuffle: global → {kind: shards, buffer: 9}"]
    assert refused(named, saved(tmp_path, data__train__shuffle=False)) == ["data.train.shuffle: global → false"]
    larger = saved(tmp_path, data__train__shuffle={"kind": "shards", "buffer": 90})
    assert refused(shards, larger) == ["data.train.shuffle.buffer: 9 → 90"]
    cut = ({**shards, "stream": {"shards": shard} | {"shuffle": "s"}} for shard in ("2 shards, 12", "3 shards, 34"))
    assert refused(*cut)[0].startswith("shards: 2 shards, 12 → 3 shards, 34 (shards of the training data with")


def test_selecting_validation_set_stays(tmp_path: Path) -> None:
    extra = {"extra": tiny_run.split(tmp_path, "val", tiny_run.EVAL)}
    old, by_extra = saved(tmp_path), saved(tmp_path, data__more=extra, train__select_by="extra/top1")
    assert refused(old, saved(tmp_path, data__val__transform__resize=9)) == ["data.val.transform.resize: 8 → 9"]
    assert refused(old, saved(tmp_path, train__limit_val_batches=1)) == ["train.limit_val_batches: null → 1"]
    assert refused(old, saved(tmp_path, data__val=None))[0].startswith("data.val: {source:")
    assert len(changes_of(old, saved(tmp_path, data__more=extra))) == 1
    changed = saved(tmp_path, data__more=extra, train__select_by="extra/top1", data__val__transform__resize=9)
    assert changes_of(by_extra, changed) == ["data.val.transform.resize: 8 → 9"]
    assert refused(by_extra, saved(tmp_path, train__select_by="extra/top1"))[0].startswith("data.more.extra: ")


def test_early_stopping_mode(tmp_path: Path) -> None:
    old = saved(tmp_path, train__early_stopping={"metric": "val/top1", "mode": "max"})
    assert refused(old, saved(tmp_path, train__early_stopping={"metric": "val/top1", "mode": "min"})) == [
        "train.early_stopping.mode: max → min"
    ]
    assert len(changes_of(old, saved(tmp_path, train__early_stopping={"metric": "val/loss", "mode": "min"}))) == 2
    assert len(changes_of(old, saved(tmp_path, train__early_stopping=None))) == 1


def test_custom_metric_that_selects_stays(tmp_path: Path) -> None:
    def with_beta(beta: float, select_by: str) -> dict[str, Any]:
        metric = {"name": "FBetaScore", "kwargs": {"beta": beta}}
        return saved(tmp_path, train__metrics=[metric], train__select_by=select_by)

    assert refused(with_beta(1.0, "val/FBetaScore"), with_beta(2.0, "val/FBetaScore")) == [
        "train.metrics[0].kwargs.beta: 1.0 → 2.0"
    ]
    assert len(changes_of(with_beta(1.0, "val/top1"), with_beta(2.0, "val/top1"))) == 1


def test_feature_probe_that_selects_stays(tmp_path: Path) -> None:
    extra = {"bank": tiny_run.split(tmp_path, "val", tiny_run.EVAL)}

    def probed(metric: str, **changes: Any) -> dict[str, Any]:
        probe = {"bank": "bank"} | {key: value for key, value in changes.items() if key != "resize"}
        bank = {"bank": extra["bank"] | {"transform": tiny_run.EVAL | {"resize": changes.get("resize", 8)}}}
        return saved(tmp_path, data__more=bank, feature_probe=probe, train__select_by=metric)

    by_knn, by_loss = probed("val/knn_top1"), probed("val/loss")
    assert refused(by_knn, probed("val/knn_top1", k=5)) == ["feature_probe.k: 20 → 5"]
    assert refused(by_knn, probed("val/knn_top1", resize=9)) == ["data.more.bank.transform.resize: 8 → 9"]
    assert changes_of(by_loss, probed("val/loss", k=5)) == ["feature_probe.k: 20 → 5"]
    assert changes_of(by_loss, probed("val/loss", resize=9)) == ["data.more.bank.transform.resize: 8 → 9"]
    assert len(changes_of(by_knn, probed("val/knn_top1", every=3, linear=False, sets=("val",)))) == 3
    without = saved(tmp_path, data__more=extra, train__select_by="val/loss")
    assert [line.partition(":")[0] for line in changes_of(by_knn, without)] == [
        "train.select_by",
        "feature_probe",
    ]
    assert changes_of(by_knn, probed("val/loss", k=5))[-1] == "feature_probe.k: 20 → 5"
    changed = probed("val/teacher_knn_top1", temperature=0.1)
    assert refused(probed("val/teacher_knn_top1"), changed) == ["feature_probe.temperature: 0.07 → 0.1"]


def test_setting_newer_than_checkpoint_has_its_default(tmp_path: Path) -> None:
    old = saved(tmp_path)
    del old["config"]["train"]["accumulate"]
    assert changes_of(old, saved(tmp_path)) == []
    assert refused(old, saved(tmp_path, train__accumulate=2)) == ["train.accumulate: 1 → 2"]


def test_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not say which config made it; start again with --fresh"):
        check_resume({}, saved(tmp_path), tmp_path)


@pytest.mark.parametrize(("done", "is_within", "least"), [(2, False, 2), (2, True, 3)])
def test_fewer_epochs_than_done(tmp_path: Path, done: int, is_within: bool, least: int) -> None:
    check_epochs(done, is_within, least, tmp_path)
    with pytest.raises(StateError, match=f"train.epochs is {least - 1}, .* at least {least}, or start again"):
        check_epochs(done, is_within, least - 1, tmp_path)


# Real runs

SETTINGS = {"train__save_every_steps": 4, **tiny_run.WITH_ONNX}


def stopped(folder: Path, name: str, *, epoch: int, batch: int) -> Path:
    """A run of two epochs that fails before a batch, and has saved before the one after the fourth of each epoch."""
    start = DistillModule.on_train_batch_start

    def fail(module: DistillModule, data: Any, number: int) -> None:
        if (module.current_epoch, number) == (epoch, batch):
            raise RuntimeError("the power is gone")
        start(module, data, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="the power is gone"):
        patch.setattr(DistillModule, "on_train_batch_start", fail)
        tiny_run.run(folder, name, **SETTINGS)
    return folder / name


@pytest.fixture(scope="module")
def runs(digits: Path) -> dict[str, Path]:
    """A run that is finished, one that stopped at the end of an epoch, and one within an epoch; read only."""
    return {
        "finished": tiny_run.run(digits, "finished", **SETTINGS).folder,
        "epoch end": stopped(digits, "epoch end", epoch=1, batch=0),
        "within": stopped(digits, "within", epoch=1, batch=5),
    }


@pytest.fixture(params=["finished", "epoch end", "within"])
def old_run(request: pytest.FixtureRequest, runs: dict[str, Path], digits: Path) -> Iterator[Path]:
    """A copy of each of them."""
    folder = digits / "copy"
    shutil.copytree(runs[request.param], folder)
    yield folder
    shutil.rmtree(folder)


def again(old_run: Path, **changes: Any) -> Any:
    return tiny_run.run(old_run.parent, old_run.name, **{**SETTINGS, **changes})


REFUSED = [
    ("train__optimizer__lr", 0.1, "train.optimizer.lr: 0.05 → 0.1"),
    ("train__optimizer__weight_decay", 0.1, "train.optimizer.weight_decay: null → 0.1"),
    ("train__optimizer", {"name": "adamw"}, "train.optimizer.name: sgd → adamw"),
    ("train__schedule", {"kind": "cosine"}, "train.schedule.kind: constant → cosine"),
    ("train__ema", {"decay": 0.5}, "train.ema: null → {decay: 0.5, warmup: true, every_steps: 1}"),
    ("train__precision", "bf16-true", "train.precision: 32-true → bf16-true"),
    ("train__accumulate", 2, "train.accumulate: 1 → 2"),
    ("seed", 4, "seed: 3 → 4"),
    ("distill", {"loss": "dkd"}, "distill.loss: soft_target → dkd"),
    ("distill", {"temperature": 2.0}, "distill.temperature: "),
    ("data__batch_size", 32, "global_batch_size: 16 → 32 (data.batch_size x processes)"),
    ("data__train__transform__flip", 0.5, "data.train.transform.flip: 0.0 → 0.5"),
    ("data__train__transform__mean", [0.5, 0.5, 0.5], "data.train.transform.mean: [0.485, 0.456, 0.406] → [0.5,"),
    (
        "student",
        {"factory": "tests.training.networks:with_batchnorm"},
        "student.factory: tests.training.networks:plain",
    ),
]


@pytest.mark.slow
def test_what_changes_the_training_is_refused(old_run: Path) -> None:
    before = {path: path.read_bytes() for path in old_run.rglob("*") if path.is_file()}
    for name, value, line in REFUSED:
        with pytest.raises(StateError) as caught:
            again(old_run, **{name: value})
        assert line in str(caught.value) and "--fresh" in str(caught.value)
        assert str(caught.value) in (old_run / "train.log").read_text()
    after = {path: path.read_bytes() for path in old_run.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"train.log"}


@pytest.mark.slow
def test_more_epochs_are_applied(old_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    again(old_run, train__epochs=3)
    assert "changed since the last start: train.epochs: 2 → 3" in caplog.text
    assert load_checkpoint(old_run / "checkpoints" / "last.ckpt")["global_step"] == 3 * 6
    assert "epochs: 3" in (old_run / "config.yaml").read_text()
    assert tiny_run.logged(old_run)[-1]["step"] == 3 * 6 - 1


@pytest.mark.slow
def test_operational_settings_are_applied(old_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = (old_run / "result.json").exists()
    before = (old_run / "config.yaml").read_text()
    again(
        old_run,
        data__num_threads=2,
        data__on_bad_sample="substitute",
        train__log_every_steps=3,
        train__save_every_steps=2,
        train__early_stopping={"patience": 5},
    )
    lines = [line for line in caplog.messages if line.startswith("changed since")]
    assert len(lines) == 5 and all("without effect" in line for line in lines) == done
    assert ((old_run / "config.yaml").read_text() == before) == done
    assert ("finished: 2 of 2 epochs; to train longer set train.epochs" in caplog.text) == done
    assert load_checkpoint(old_run / "checkpoints" / "last.ckpt")["global_step"] == 2 * 6


@pytest.mark.slow
def test_fewer_epochs(runs: dict[str, Path], digits: Path) -> None:
    shutil.copytree(runs["epoch end"], digits / "shorter")
    result = tiny_run.run(digits, "shorter", **SETTINGS, train__epochs=1)
    assert result.evaluations["val"].num_samples == tiny_run.NUM_VAL
    assert "epochs: 2" in (digits / "shorter" / "config.yaml").read_text()
    shutil.copytree(runs["within"], digits / "shorter still")
    with pytest.raises(StateError, match="to at least 2"):
        tiny_run.run(digits, "shorter still", **SETTINGS, train__epochs=1)


@pytest.mark.slow
def test_finished_run_trains_nothing(runs: dict[str, Path], digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = digits / "done"
    shutil.copytree(runs["finished"], folder)
    names = ("checkpoints/last.ckpt", "result.json", "config.yaml", "history.jsonl", "metrics.csv")
    before = {name: (folder / name).read_bytes() for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillModule, "__init__", None)  # neither trained nor evaluated
        found = tiny_run.run(folder.parent, "done", **SETTINGS)
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert {name: each.to_dict() for name, each in found.evaluations.items()} == tiny_run.result(folder)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["result.json", "exported/model.onnx", "history.jsonl"])
def test_finished_run_completes_its_results(runs: dict[str, Path], digits: Path, missing: str) -> None:
    folder = digits / f"incomplete {Path(missing).suffix}"
    shutil.copytree(runs["finished"], folder)
    (folder / missing).unlink()
    tiny_run.run(digits, folder.name, **SETTINGS)
    assert (folder / missing).is_file()
    assert tiny_run.result(folder) == tiny_run.result(runs["finished"])
    weights = [(each / "exported" / "model.safetensors").read_bytes() for each in (folder, runs["finished"])]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_finished_run_evaluates_new_split(runs: dict[str, Path], digits: Path) -> None:
    folder = digits / "tested later"
    shutil.copytree(runs["finished"], folder)
    config = (folder / "config.yaml").read_text()
    test = tiny_run.split(digits, "odd19", tiny_run.EVAL)
    found = tiny_run.run(digits, folder.name, **SETTINGS, data__test=test)
    assert found.evaluations["test"].num_samples == 19
    assert (folder / "config.yaml").read_text() == config


@pytest.mark.slow
def test_ema_of_finished_run_is_exported_again(digits: Path) -> None:
    changes = {"train__ema": {"decay": 0.5}, "data__val": None}
    folder = tiny_run.run(digits, "average", **changes).folder
    before = (folder / "exported" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "exported")
    tiny_run.run(digits, "average", **changes)
    assert (folder / "exported" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_patience_continues_early_stopped_run(digits: Path, caplog: pytest.LogCaptureFixture) -> None:
    def stopping(patience: int) -> Path:
        early = {"metric": "val/top1", "patience": patience}
        return tiny_run.run(
            digits, "early", train__epochs=9, train__optimizer__lr=1e-12, train__early_stopping=early
        ).folder

    last = stopping(2) / "checkpoints" / "last.ckpt"
    stopping(2)
    assert "finished: 3 of 9 epochs, stopped early as val/top1 has not improved for 2" in caplog.text
    assert load_checkpoint(last)["global_step"] == 3 * 6
    stopping(4)
    assert load_checkpoint(last)["global_step"] == 5 * 6


@pytest.mark.slow
def test_checkpoint_of_other_loop_is_refused(digits: Path) -> None:
    save_checkpoint({"state_dict": {}, "weights": torch.zeros(1)}, digits / "own" / "checkpoints" / "last.ckpt")
    with pytest.raises(StateError, match="is not the checkpoint of kd-pipeline train: it has no 'loops'; start again"):
        tiny_run.run(digits, "own")


@pytest.mark.slow
def test_refused_data_leaves_class_list(digits: Path) -> None:
    def named(name: str) -> Any:
        return {**tiny_run.split(digits, "train", tiny_run.TRAIN)["source"], "classes": [name, *"123456789"]}

    folder = tiny_run.run(digits, "named", data__train__source=named("zero")).folder
    before = (folder / "classes.json").read_text()
    with pytest.raises(StateError, match=r"classes\[0\]: zero → one"):
        tiny_run.run(digits, "named", data__train__source=named("one"))
    assert (folder / "classes.json").read_text() == before
