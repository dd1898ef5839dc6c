"""What setup.cfg says, and the files of the repository."""

import configparser
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def lines_of(section: str, key: str) -> list[str]:
    return setup_cfg()[section][key].split("\n")[1:]


def extras() -> dict[str, list[str]]:
    return {name: lines_of("options.extras_require", name) for name in setup_cfg()["options.extras_require"]}


def python_versions() -> list[str]:
    """The minor versions of Python in the classifiers."""
    versions = (line.rpartition(":: ")[2] for line in lines_of("metadata", "classifiers") if ":: Python ::" in line)
    return [version for version in versions if "." in version]
