"""Whether a process that is not our child has ended."""

import time
from pathlib import Path


def ends(pid: int, *, within_s: float = 5.0) -> bool:
    """Wait until the process is gone or nobody has asked for its status; a signal takes its time on a busy machine."""
    deadline_s = time.monotonic() + within_s
    while is_running(pid):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
