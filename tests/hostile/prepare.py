"""Good files that hostile ones are made from."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.hostile.cases import write_torch_archive, write_zip, zeros

PHOTOS, RECORDING, TOP_RECORDING, INT8_RECORDING = "photos", "recording", "top_recording", "int8_recording"
RUN, BOMB = "run", "bomb"
NUM_PHOTOS = 12
BOMB_BYTES = 700_000_000


def write_bombs(folder: Path) -> None:
    """Files of a few megabytes that unpack to more than they may take."""
    array = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({BOMB_BYTES // 100}, 10, 10), }}\n".encode()
    start = b"\x93NUMPY\x02\x00" + len(array).to_bytes(4, "little") + array
    write_zip(folder / f"{BOMB}.npz", [("images.npy", [start, *zeros(BOMB_BYTES)])])
    write_torch_archive(folder / f"{BOMB}.pt", BOMB_BYTES // 4, zeros(BOMB_BYTES), compress=True)
    write_zip(folder / f"{BOMB}.pickles.pt", [("a/data.pkl", zeros(BOMB_BYTES))])


def photo(folder: Path, number: int) -> Path:
    """One of the photographs below `folder`."""
    return folder / PHOTOS / f"class {number % 3}" / f"{number:02}.jpg"


def make(folder: Path) -> None:
    """Write them into `folder`; it needs DALI, so call it in a process of its own."""
    from kd_pipeline.data.transforms import EvalTransform
    from kd_pipeline.models.registry import ModelSettings, open_model
    from kd_pipeline.training.settings import ExportSettings
    from kd_pipeline.workflows.exported import export_student
    from tests import recordings

    write_bombs(folder)
    rng = np.random.default_rng(3)
    for number in range(NUM_PHOTOS):
        path = photo(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(path)
    recordings.recorded(folder / PHOTOS, folder / RECORDING)
    recordings.recorded(folder / PHOTOS, folder / TOP_RECORDING, kept={"top_k": 2, "dtype": "float16"})
    recordings.recorded(folder / PHOTOS, folder / INT8_RECORDING, kept={"dtype": "int8"})
    model = ModelSettings(builtin="small_resnet", num_classes=3, kwargs={"width": 4})
    export_student(
        open_model(model).eval(),
        model,
        folder / RUN / "exported",
        classes=("cat", "dog", "hen"),
        transform=EvalTransform(size=16),
        calibration_set=lambda: None,  # type: ignore[arg-type, return-value]  # only for an engine
        export=ExportSettings(onnx=False),
    )
