"""What a run was started with: its command, the machine, and the versions of all packages."""

import os
import platform
import shlex
import socket
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

__all__ = ["command_line", "describe_environment"]


def command_line() -> str:
    """The command of this process, as one would type it."""
    name, *arguments = sys.argv
    program = Path(name).name
    if program == "__main__.py":  # python -m package
        program = f"python -m {Path(name).parent.name}"
        return shlex.join([*program.split(), *arguments])
    return shlex.join(["python", name, *arguments] if program.endswith(".py") else [program, *arguments])


def describe_environment() -> dict[str, Any]:
    """Command, folder, machine, and the version of every installed package."""
    packages = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"]}
    return {
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda each: each[0].lower())),
    }
