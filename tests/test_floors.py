"""The oldest versions that pip may install."""

import configparser
import re

from tests.test_messages import REPOSITORY

FIXED = {
    "timm": (1, 0, 27),  # its loader ran the code in checkpoints
    "torch": (2, 10),  # weights_only=True could be made to write out of bounds
    "pillow": (12, 3),  # writes out of bounds in paste, crop and readers
    "scikit-learn": (1, 5),
    "onnx": (1, 21),
    "pyyaml": (6,),
    "lightning": (2, 6, 6),
    "mlflow": (3, 17, 2),
}
"""The first version without the faults that are known."""


def test_floors_are_above_known_faults() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found = set()
    for line in filter(None, "\n".join(texts).splitlines()):
        name = re.split(r"[>=<\[ ]", line)[0].lower()
        if name in FIXED:
            floor = re.search(r">=([\d.]+)", line)
            assert floor is not None, line
            assert tuple(map(int, floor[1].split("."))) >= FIXED[name], line
            found.add(name)
    assert found == FIXED.keys()
