"""Pages with code: their blocks are written to files or run in order, and the output that they show must occur."""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.forks import Command

__all__ = ["Block", "blocks_of", "missing_lines", "run_page"]

_SHIM = """#!{python} -SE
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    output, error, status = json.load(server.makefile())
sys.stdout.write(output)
sys.stderr.write(error)
sys.exit(status)
"""
"""A program that lets the test fork one, as each new Python would import torch, DALI and Lightning for seconds."""

_TORCHRUN = "from torch.distributed.run import main\nimport sys\nsys.argv[0] = 'torchrun'\nmain()"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name in its first line, if that is a comment with one: the block is the file."""
        match = re.match(r"# ([\w/-]+\.(?:py|yaml|csv))\b", self.text)
        return match[1] if match else None

    @property
    def status(self) -> int:
        """The exit status that a comment announces, 0 by default."""
        match = re.search(r"# .*exit status (\d+)", self.text)
        return int(match[1]) if match else 0

    @property
    def interrupted_after(self) -> str | None:
        """What is on the screen when the page says to press Ctrl-C."""
        match = re.search(r'# .*Ctrl-C after "(.*?)"', self.text)
        return match[1] if match else None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks, in order."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in found]


def missing_lines(shown: str, output: str) -> list[str]:
    """The lines of `shown` that `output` does not have.

    Line breaks and spaces count as one space, as tables wrap long paths. `...` is anything, and a number with a decimal
    point is any such number, as times and accuracies differ between machines.
    """
    text = f" {' '.join(output.split())} "
    return [line for line in shown.splitlines() if line.strip() and not _pattern(line).search(text)]


def run_page(page: Path, folder: Path) -> None:
    """Do in `folder` what the page says, from the first block to the last."""
    output = ""
    with _programs(folder) as (server, environment):
        for block in blocks_of(page):
            if block.file is not None:
                (folder / block.file).write_text(block.text, encoding="utf-8")
            elif block.language == "sh":
                output = _run(block, folder, server, environment)
            elif block.language == "python":
                output = _finish(Command([], folder, environment, script=block.text), block)
            elif block.language == "text":
                missing = missing_lines(block.text, output)
                assert not missing, f"{page.name} shows {missing}, and this was written:\n{output}"


def _pattern(line: str) -> re.Pattern[str]:
    escaped = re.escape(" ".join(line.split()))
    any_number = re.sub(r"\d[\d,]*\\\.\d+(e-\d+)?", r"[\\d.,]+(e-\\d+)?", escaped)
    return re.compile(rf" {any_number.replace(re.escape('...'), '.{0,200}?')} ")


@contextmanager
def _programs(folder: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A socket that programs on the path of the environment connect to."""
    bin_folder = folder.parent / f"{folder.name}-bin"
    bin_folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bin_folder / "socket"))
        server.listen()
        server.settimeout(0.05)
        for name in ("kd-pipeline", "python", "torchrun"):
            program = bin_folder / name
            program.write_text(_SHIM.format(python=sys.executable, address=str(bin_folder / "socket")))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        yield server, {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    shutil.rmtree(bin_folder)


def _run(block: Block, folder: Path, server: socket.socket, environment: dict[str, str]) -> str:
    """All that the lines of an `sh` block write, in bash."""
    with subprocess.Popen(
        ["bash", "-e", "-c", block.text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        while shell.poll() is None:
            try:
                client, _ = server.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(None)
                client.sendall(json.dumps(_answer(block, *json.load(client.makefile()))).encode())
        assert shell.stdout is not None
        output = shell.stdout.read()
    assert shell.returncode == block.status, f"exit status {shell.returncode} of\n{block.text}\n{output}"
    return output


def _answer(
    block: Block, program: str, arguments: list[str], folder: str, environment: dict[str, str]
) -> tuple[str, str, int | None]:
    script = None
    if program == "python":
        script = Path(folder, arguments.pop(0)).read_text(encoding="utf-8")
    elif program == "torchrun":
        script = _TORCHRUN
    command = Command(arguments, Path(folder), environment, script=script)
    before = "" if block.interrupted_after is None else _interrupt(command, block.interrupted_after)
    output, error = command.communicate()
    return output, before + error, command.returncode


def _interrupt(command: Command, shown: str, within_s: float = 120.0) -> str:
    """Press Ctrl-C once the command has shown this; all that it has shown until then."""
    written, deadline_s = "", time.monotonic() + within_s
    while shown not in written:
        assert command.poll() is None and time.monotonic() < deadline_s, f"{shown!r} is not in\n{written}"
        written += command.stderr.read()
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    return written


def _finish(command: Command, block: Block) -> str:
    output, error = command.communicate()
    assert command.returncode == block.status, output + error
    return output + error
