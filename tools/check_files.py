"""Check text files for what no linter looks at: trailing spaces, the last line's end, YAML, marks of a merge.

    python tools/check_files.py FILE ...

It prints each fault, and ends with status 1 if there is one.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml


def faults_of(path: Path) -> Iterator[str]:
    """The faults of one file, each with its line."""
    content = path.read_bytes()
    if b"\0" in content:
        return
    lines = content.decode("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if line != line.rstrip():
            yield f"{path}:{number}: space or carriage return at the end"
        if re.match(r"(<{7}|>{7}|\|{7}) ", line):
            yield f"{path}:{number}: mark of a merge"
    if content and (lines[-1] or not lines[-2].strip()):
        yield f"{path}:{len(lines)}: ends in no newline, or in empty lines"
    if path.suffix in (".yaml", ".yml"):
        try:
            list(yaml.compose_all(content))
        except yaml.YAMLError as exc:
            yield f"{path}: {exc}"


def main(names: list[str]) -> int:
    """Print the faults of all files, and return the exit status."""
    faults = [fault for name in names for fault in faults_of(Path(name))]
    print(*faults, sep="\n", end="\n" if faults else "")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
