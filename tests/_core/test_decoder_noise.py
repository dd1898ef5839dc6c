"""Lines of decoders are left out of stderr, and nothing else is, whatever ends the process."""

import subprocess
import sys

import pytest

SCRIPT = r"""
import os, sys
from kd_pipeline._core.decoder_noise import without_decoder_noise

noise = b"\x1b[0;31m[ERROR] \x1b[0m[libjpeg_turbo_decoder] Could not decode\n"
with without_decoder_noise():
    os.write(2, b"before\n" + noise[:7])
    os.write(2, noise[7:] + b"\x1b[0;31mred\x1b[0m\n" + noise)
    os.write(2, b"no end")
    print("Python", file=sys.stderr)
    os.system("echo child >&2")
    {end}
os.write(2, b"\nafter\n" + noise)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "last"),
    [
        ("pass", 0, b"\nafter\n\x1b[0;31m[ERROR] \x1b[0m[libjpeg_turbo_decoder] Could not decode\n"),
        ("os.abort()", -6, b""),
        ("os._exit(3)", 3, b""),
    ],
)
def test_only_lines_of_decoders_are_left_out(end: str, status: int, last: bytes) -> None:
    script = SCRIPT.replace("{end}", end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False)
    assert done.returncode == status
    assert done.stderr.replace(b"Python\n", b"") == b"before\n\x1b[0;31mred\x1b[0m\nno endchild\n" + last
    assert done.stderr.count(b"Python\n") == 1
