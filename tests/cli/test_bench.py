"""`kd-pipeline bench`: what the options mean."""

from pathlib import Path

import pytest

from kd_pipeline import cli
from kd_pipeline.bench.step import BenchStepSettings
from kd_pipeline.errors import DataError
from kd_pipeline.models.registry import ModelSettings


def test_bench_step_names_networks_without_heads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BenchStepSettings] = []

    def stop(settings: BenchStepSettings, **options: object) -> None:
        seen.append(settings)
        raise DataError("stopped")

    monkeypatch.setattr("kd_pipeline.bench.step.bench_step", stop)
    assert cli.main(["bench", "step", "--headless", "--teacher", "timm:vit_small_patch16_224"]) == 1
    assert seen[0].teacher == ModelSettings(timm="vit_small_patch16_224", num_classes=0)
    assert seen[0].student == ModelSettings(torchvision="resnet18", num_classes=0)
    assert cli.main(["bench", "step", "--student", "timm:resnet18"]) == 1
    assert seen[1].student == ModelSettings(timm="resnet18")
    config = tmp_path / "config.yaml"
    config.write_text("data: {batch_size: 8}\n")
    assert cli.main(["bench", "step", "-c", str(config), "--headless"]) == 1
    assert len(seen) == 2 and "in a config it is num_classes: 0" in capsys.readouterr().err
