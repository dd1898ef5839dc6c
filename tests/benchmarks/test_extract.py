"""The benchmark of extracting features."""

import json
from pathlib import Path

import pytest

from benchmarks.extract import BOTH, LOADER, NETWORK, ExtractResult, main
from kd_pipeline.bench.photographs import link_photographs

SETTINGS = {"device": "cpu", "repeats": 2, "network": "resnet18", "epoch": 8, "size": 32, "batch_size": 4}
RESULT = ExtractResult({LOADER: [100.0, 300.0], NETWORK: [25.0, 60.0], BOTH: [19.0, 60.0]}, SETTINGS, {"num_cores": 2})


def test_ratios_are_taken_within_repeats() -> None:
    assert RESULT.of_slower == [19 / 25, 1.0]
    assert RESULT.of_sequence == pytest.approx([0.95, 1.2])


def test_tables_have_rates_and_ratios() -> None:
    text, markdown = RESULT.table().splitlines(), RESULT.markdown().splitlines()
    assert text[2].split() == ["network", "alone", "42.5", "(25.0-60.0)"]
    assert "| extract_features / the parts one after the other | 1.075 (0.950-1.200) |" in markdown
    assert "The network is slower; the limit on this device is the parts one after the other" in text[-1]


@pytest.mark.slow
def test_each_part_is_measured_on_the_same_images(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "extract.json"
    options = ["--root", str(photographs), "--network", "resnet18", "--size", "32", "--num-images", "10"]
    assert main([*options, "--batch-size", "4", "--repeats", "2", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["epoch"] == 10 and [*found["images_per_s"]] == [LOADER, NETWORK, BOTH]
    assert all(len(rates["repeats"]) == 2 and rates["min"] > 0 for rates in found["images_per_s"].values())
    assert out.with_suffix(".md").read_text().startswith("| ") and "all repeats: " in capsys.readouterr().out


def test_unknown_library_is_an_error(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", str(photographs), "--out", str(tmp_path / "extract.json")]
    assert main([*options, "--network", "keras:resnet18"]) == 1
    assert "a network is a torchvision name, or timm:NAME" in capsys.readouterr().err


def test_links_are_spread_over_the_folder(photographs: Path, tmp_path: Path) -> None:
    folder = link_photographs(photographs, tmp_path / "links", num_images=3)
    linked = sorted(path.name for path in folder.glob("*/*.jpg"))
    assert linked == ["000000000.jpg", "000000019.jpg", "000000039.jpg"]
