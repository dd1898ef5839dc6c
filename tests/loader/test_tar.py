"""An image that a tar shard does not have in full is an unreadable sample of a loader."""

import torch

from kd_pipeline.data.sources import Tar
from kd_pipeline.loader import KDDataLoader
from tests.streams import EVAL, fields
from tests.tar_files import write_tar


def test_image_that_is_cut_off_is_substituted(photo_folder, tmp_path):
    files = {}
    for number, path in enumerate(sorted(photo_folder.rglob("*.jpg"))[:6]):
        files |= {f"{number}.cls": b"0", f"{number}.jpg": path.read_bytes()}
    path = write_tar(tmp_path / "a.tar", files)
    source = Tar(path)
    with path.open("r+b") as file:
        file.truncate(int(source._table.starts[-1]) + 99)
    with KDDataLoader(
        Tar(path), EVAL, batch_size=5, shuffle=False, device="cpu", on_bad_sample="substitute", max_bad_fraction=0.2
    ) as loader:
        batches = [fields(batch) for batch in loader]
        (bad,) = loader.bad_samples
    assert torch.cat([batch["valid"] for batch in batches]).tolist()[:6] == [True] * 5 + [False]
    assert (bad.index, bad.path) == (5, "a.tar::5.jpg") and bad.reason.startswith("the archive is cut off")
