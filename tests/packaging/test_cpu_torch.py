"""Where a CPU torch is installed, nothing brings another torch or the CUDA libraries that it would need."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.metadata import REPOSITORY, extras, lines_of

EXTRAS = ("cpu", "train", "timm", "demo")
OF_DALI = {
    "nvidia-dali-cuda130",
    "nvidia-libnvcomp-cu13",
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvjpeg",
    "nvidia-nvjpeg2k-cu13",
    "nvidia-nvtiff-cu13",
}
"""What DALI itself asks for: 100 MB of codecs, which docs/install.md names."""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment that seems to have torch and torchvision from the index of CPU wheels."""
    subprocess.run([uv(), "venv", "--quiet", "--python", sys.executable, tmp_path / "environment"], check=True)
    (packages,) = tmp_path.glob("environment/lib/python3*/site-packages")
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "torchvision"):
        folder = packages / f"{name}-{pins[name]}+cpu.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {pins[name]}+cpu\n")
        (folder / "RECORD").touch()
    return tmp_path / "environment"


def uv() -> str:
    found = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    assert found, "uv is in the extra dev"
    return found


@pytest.mark.slow
def test_cpu_torch_stays_alone(environment: Path) -> None:
    requirements = lines_of("options", "install_requires")
    requirements += [line for name in EXTRAS for line in extras()[name]]
    command = [uv(), "pip", "install", "--dry-run", "--python", environment / "bin" / "python"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"is the package index out of reach?\n{done.stderr}"
    names = {line.split()[1].partition("==")[0] for line in done.stderr.splitlines() if line.startswith(" + ")}
    assert "openvino" in names
    assert {name for name in names if name.startswith("nvidia-")} == OF_DALI
    assert not names & {"torch", "torchvision", "triton"}
    assert not [name for name in names if name.startswith("cuda")]
    assert " - " not in done.stderr


def test_page_names_what_dali_brings() -> None:
    page = (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")
    assert not [name for name in OF_DALI if name not in page]
    assert f"kd_pipeline[{','.join(EXTRAS)}]" in page
